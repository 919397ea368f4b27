"""The studio in a real browser, with real processes: headless Chromium by Playwright."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import pytest
from studio_helpers import Process, until

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = next((p for c in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(c))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

AXE = (Path(__file__).parent / "vendor" / "axe.min.js").read_text(encoding="utf-8")
LONG = 240_000  # ms in which what needs the libraries must be there, on a machine that does other things too
PLACES = ("/", "/data", "/data/tweets", "/train", "/runs", "/compare", "/chat", "/adapters")
expect = playwright.expect
expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as started:
        made = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    """One studio for all; a test that kills it puts another in its place."""
    found = {"root": tmp_path_factory.mktemp("workspace")}
    found["now"] = Process(found["root"])
    yield found
    found["now"].end()


@pytest.fixture
def page(chromium, studio):
    context = chromium.new_context(viewport={"width": 1200, "height": 900})
    made = context.new_page()
    made.set_default_timeout(LONG)
    wrong: list[str] = []
    made.on("pageerror", lambda error: wrong.append(str(error)))
    made.goto(studio["now"].address)
    yield made
    context.close()
    assert not wrong


def home(page) -> str:
    return re.match(r"http://[^/]+", page.url)[0]


def ready(page) -> None:
    """Until the form is there."""
    expect(page.locator("#f-method")).to_be_visible(timeout=LONG)


def write(page, text: str) -> None:
    page.fill("#yaml", text)


def state(page, *wanted: str) -> None:
    expect(page.locator(", ".join(f"#state .badge.{w}" for w in wanted))).to_be_visible(timeout=LONG)


def test_the_first_run_outlives_page_and_studio(page, studio, chromium):
    """Three clicks: an example, Train, chat. Between them the page is reloaded and closed, and the studio killed."""
    page.click("#example-tweets")
    ready(page)
    expect(page.locator("#yaml")).to_have_value(re.compile("source: tweets"))
    write(
        page, "data: {source: tweets}\ntraining: {max_steps: 12, eval_strategy: steps, save_strategy: steps, interval: 6}\n"
    )
    expect(page.locator("#plan")).to_contain_text("Fits", timeout=LONG)
    page.click("#start")
    page.wait_for_url("**/runs/*")
    name = page.url.rpartition("/")[2]
    state(page, "running")
    page.reload()
    state(page, "running", "done")
    place, context = page.url, page.context
    page.close()  # a closed tab
    port = studio["now"].port
    studio["now"].kill()
    studio["now"] = Process(studio["root"], port)
    again = context.new_page()  # the cookie still lets it in
    again.set_default_timeout(LONG)
    again.goto(place)
    state(again, "done")
    expect(again.locator("#step")).to_contain_text("12")
    expect(again.locator("#curve canvas")).to_be_visible()
    expect(again.locator("#samples .sample").first).to_be_visible()
    expect(again.locator("#log")).to_contain_text("Saved in runs/" + name)
    metrics = json.loads((studio["root"] / "runs" / name / "metrics.json").read_text())["metrics"]
    assert metrics["loss"] < metrics["loss_before"]
    again.click("#to-chat")
    expect(again.locator(f'input[name="adapter"][value="{name}"]')).to_be_checked()


def test_form_and_recipe_in_step(page):
    page.goto(home(page) + "/train")
    ready(page)
    page.fill('[id="f-training.epochs"]', "7")
    expect(page.locator("#yaml")).to_have_value(re.compile("epochs: 7"))
    write(page, "training:\n  epochs: 2\n  seed: 5\n")
    expect(page.locator('[id="f-training.epochs"]')).to_have_value("2")
    page.select_option("#f-method", "prompt-tuning")
    expect(page.locator("#yaml")).to_have_value(re.compile("method: prompt-tuning"))
    expect(page.locator('[id="f-method_options.num_virtual_tokens"]')).to_have_count(1)
    assert "seed: 5" in page.input_value("#yaml")
    page.fill('[id="f-training.epochs"]', "many")
    expect(page.locator("#problems")).to_contain_text("training.epochs")
    expect(page.locator('[id="f-training.epochs"]')).to_have_attribute("aria-invalid", "true")
    page.click("#start")
    expect(page.locator("#problems")).to_contain_text("training.epochs")
    assert page.url.endswith("/train")
    write(page, "trainin: {epochs: 1}\n")
    expect(page.locator("#problems")).to_contain_text("did you mean 'training'?")


def test_a_bad_upload_says_why(page, tmp_path):
    page.goto(home(page) + "/data")
    bad = tmp_path / "rows.jsonl"
    bad.write_text("{cut")
    page.set_input_files('input[type="file"]', bad)
    page.click("text=Upload")
    expect(page.locator("#told")).to_contain_text("rows.jsonl", timeout=LONG)


@pytest.mark.parametrize(("scheme", "width", "language"), [("light", 1200, "en"), ("dark", 375, "zh")])
def test_every_page_is_without_serious_faults(chromium, studio, scheme, width, language):
    """axe-core finds nothing serious, nothing is wider than the window, and no text is in another language."""
    context = chromium.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, locale=language, bypass_csp=True
    )
    page = context.new_page()
    page.set_default_timeout(LONG)
    page.goto(studio["now"].address)
    runs = [f"/runs/{p.name}" for p in (studio["root"] / "runs").iterdir()]
    for place in [*PLACES, *runs[:1]]:
        page.goto(home(page) + place)
        if place == "/train":
            ready(page)
        if place == "/data/tweets":
            expect(page.locator("#rows svg")).to_be_visible(timeout=LONG)
        assert page.get_attribute("html", "lang") == language
        page.evaluate(AXE)
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        serious = [v for v in found["violations"] if v["impact"] in ("serious", "critical")]
        told = [(v["id"], [n["html"][:200] for n in v["nodes"][:3]]) for v in serious]
        assert not serious, (place, told)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), place
    context.close()


def test_pages_answer_quickly(page):
    """The median of idle answers, by the browser's own clock and without its drawing."""
    took = {}
    for place in ("/", "/runs", "/adapters", "/data"):
        times = page.evaluate(
            "async (p) => { const t = []; for (let i = 0; i < 7; i++) { const b = performance.now();"
            " await (await fetch(p)).text(); t.push(performance.now() - b); } return t; }",
            place,
        )
        took[place] = sorted(times)[0]  # the machine does other things too
    assert max(took.values()) < 100, took


@pytest.mark.slow
def test_two_runs_are_queued_stopped_and_resumed(page):
    names = []
    for seed in (1, 2):
        page.goto(home(page) + "/train")
        ready(page)
        write(page, f"training: {{max_steps: 4000, seed: {seed}, save_strategy: steps, eval_strategy: 'no', interval: 5}}\n")
        page.click("#start")
        page.wait_for_url("**/runs/*")
        names.append(page.url.rpartition("/")[2])
    state(page, "waiting")
    page.click("#stop")
    state(page, "stopped")
    page.goto(f"{home(page)}/runs/{names[0]}")
    expect(page.locator("#step")).to_contain_text(re.compile(r"\d+ of 4000"), timeout=LONG)
    page.click("#stop")
    state(page, "stopped")
    reached = int(page.locator("#step").inner_text().split()[0])
    page.click("#resume")
    expect(page.locator("#step")).not_to_have_text(re.compile(f"^{reached} "), timeout=LONG)
    until(lambda: int(page.locator("#step").inner_text().split()[0]) > reached, 120)
    page.click("#stop")
    state(page, "stopped")


@pytest.mark.slow
def test_the_keyboard_is_enough(page):
    """From the first page to a run that goes on."""
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    for _ in range(3):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "example-tweets":
            break
    page.keyboard.press("Enter")
    page.wait_for_url("**/train?example=tweets")
    ready(page)
    page.focus("#yaml")
    page.keyboard.press("Control+End")
    page.keyboard.type("training:\n  max_steps: 2\n")
    expect(page.locator('[id="f-training.max_steps"]')).to_have_value("2")
    for _ in range(4):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "start":
            break
    page.keyboard.press("Enter")
    page.wait_for_url("**/runs/*")
    state(page, "done")


@pytest.mark.slow
def test_three_answer_side_by_side(page, studio):
    """The base, an adapter, and the adapter under a second name, in one batch; a vote is kept."""
    adapters = [p.parent for p in sorted((studio["root"] / "runs").glob("*/adapter_config.json"))]
    assert adapters, "the first run makes one"
    second = studio["root"] / "runs" / "again"
    if not second.exists():
        shutil.copytree(adapters[0], second, ignore=shutil.ignore_patterns("checkpoint-*"))
    page.goto(f"{home(page)}/chat?adapter={adapters[0].name}")
    page.check('input[name="adapter"][value="again"]')
    page.fill("#message", "Tweet text : my train was late again Label :")
    page.click("#send")
    begun = time.monotonic()
    expect(page.locator(".answer button")).to_have_count(3, timeout=LONG)
    assert time.monotonic() - begun < LONG
    texts = page.locator(".answer .text").all_inner_texts()
    assert texts[1] == texts[2]  # the same adapter gives the same text
    best = page.locator(".answer h3").nth(1).inner_text()
    page.locator(".answer button").nth(1).click()
    expect(page.locator(".answer.best h3")).to_have_text(best)
    page.goto(home(page) + "/chat")
    page.click("section[aria-labelledby=earlier] a")
    expect(page.locator(".answer.best")).to_have_count(1)
