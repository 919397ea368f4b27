"""The studio in a real browser, with real processes: what takes seconds. The rest is in test_studio_browser_slow.py."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from statistics import median

import psutil
import pytest
import yaml
from studio_browser import LONG, TINY, home, ready, state
from studio_helpers import Process

from graftlm.studio import records

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
expect = playwright.expect

AXE = (Path(__file__).parent / "vendor" / "axe.min.js").read_text(encoding="utf-8")
PLACES = (
    "/", "/data", "/data/tweets", "/data/odd.csv", "/train", "/runs", "/compare", "/chat", "/chat?name=one", "/adapters",
    "/nothing",
)  # fmt: skip
CHAT = {
    "title": "hi", "base": "graftlm-base", "adapters": ["", "gone"], "system": "Be kind.", "params": {"top_k": 5},
    "turns": [
        {"prompt": "<b>hi", "adapters": ["", "gone"], "answers": {"": "a" * 300}, "wrong": {"gone": "none"}, "vote": "base"}
    ],
}  # fmt: skip
FETCH = "async (p) => { const b = performance.now(); await (await fetch(p)).text(); return performance.now() - b; }"
RECIPE = TINY + "training: {max_steps: 12, eval_strategy: steps, save_strategy: steps, interval: 6}\n"


def test_the_first_run_outlives_page_and_studio(page, studio):
    """An example, Train, chat. Between them the page is reloaded and closed, and the studio killed."""
    page.click("#example-tweets")
    ready(page)
    expect(page.locator("#yaml")).to_have_value(re.compile("source: tweets"))
    page.fill("#yaml", RECIPE)
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
    studio["now"] = Process(studio["root"], port, "--folder", str(studio["given"]))
    again = context.new_page()  # the cookie still lets it in
    again.set_default_timeout(LONG)
    again.goto(place)
    state(again, "done")
    expect(again.locator("#step")).to_contain_text("12")
    expect(again.locator("#curve canvas")).to_be_visible()
    expect(again.locator("#samples .sample").first).to_be_visible()
    expect(again.locator("#samples summary")).to_have_count(2)  # an evaluation each
    expect(again.locator("#log")).to_contain_text("Saved in runs/" + name)
    assert json.loads((studio["root"] / "runs" / name / "metrics.json").read_text())["metrics"]["loss"] > 0
    again.click("#to-chat")
    expect(again.locator(f'input[name="adapter"][value="{name}"]')).to_be_checked()


def test_form_and_recipe_in_step(page):
    page.goto(home(page) + "/train")
    ready(page)
    page.fill('[id="f-training.epochs"]', "7")
    expect(page.locator("#yaml")).to_have_value(re.compile("epochs: 7"))
    page.fill("#yaml", "training:\n  epochs: 2\n  seed: 5\n")
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
    page.fill("#yaml", "trainin: {epochs: 1}\n")
    expect(page.locator("#problems")).to_contain_text("did you mean 'training'?")


def test_train_takes_what_was_typed_last(page, studio):
    """Also where it is pressed before form and recipe are in step."""
    page.goto(home(page) + "/train")
    ready(page)
    page.fill("#yaml", TINY + "training: {max_steps: 12}\n")
    expect(page.locator('[id="f-training.max_steps"]')).to_have_value("12")
    length, other = '[id="f-data.max_length"]', TINY.replace("2}", "3}")
    for field, text, wanted in ((length, "77", {"max_length": 77}), ("#yaml", other, {"max_eval_examples": 3})):
        page.fill(field, text)
        page.click("#start")
        page.wait_for_url("**/runs/*")
        name = page.url.rpartition("/")[2]
        found = yaml.safe_load((studio["root"] / "runs" / name / "settings.yaml").read_text())
        assert found["data"].items() >= wanted.items(), field
        state(page, "waiting", "running")
        page.click("#stop")
        state(page, "stopped", "stopping")
        page.goto(home(page) + "/train")
        ready(page)


def test_a_bad_upload_says_why(page, tmp_path):
    page.goto(home(page) + "/data")
    bad = tmp_path / "rows.jsonl"
    bad.write_text("{cut")
    page.set_input_files('input[type="file"]', bad)
    page.click("text=Upload")
    expect(page.locator("#told")).to_contain_text("'data/rows.jsonl', line 1", timeout=LONG)  # as a text, not as HTML


@pytest.mark.parametrize(("scheme", "width", "language"), [("light", 1200, "en"), ("dark", 375, "zh")])
def test_every_page_is_without_serious_faults(chromium, studio, scheme, width, language):
    """axe-core finds nothing serious, nothing is wider than the window, and no text is in another language."""
    context = chromium.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, locale=language, bypass_csp=True
    )
    page = context.new_page()
    page.set_default_timeout(LONG)
    page.goto(studio["now"].address)
    records.write(studio["root"] / "chats" / "one.json", CHAT)
    (studio["root"] / "data" / "odd.csv").write_text("ask,reply\na,b\n")
    names = [p.parent.name for p in (studio["root"] / "runs").glob("*/adapter_config.json")]
    of_runs = [f"/{part}/{name}" for name in names[:1] for part in ("runs", "adapters")]
    runs = sorted(p.name for p in (studio["root"] / "runs").iterdir())
    of_runs += ["/compare/runs?run=" + "&run=".join(runs[:2])] if len(runs) > 1 else []
    for place in [*PLACES, *of_runs]:
        page.goto(home(page) + place)
        if place == "/train":
            ready(page)
        if place.startswith("/data/"):
            shown = "svg" if "tweets" in place else ".wrong"
            expect(page.locator(f"#rows {shown}")).to_be_visible(timeout=LONG)
        assert page.get_attribute("html", "lang") == language
        page.evaluate(AXE)
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        serious = [v for v in found["violations"] if v["impact"] in ("serious", "critical")]
        told = [(v["id"], [n["html"][:200] for n in v["nodes"][:3]]) for v in serious]
        assert not serious, (place, told)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), place
    context.close()


def test_pages_answer_quickly(page, studio):
    """In under 100 ms (median): of the studio's own processor time, whatever else this machine does, and by the browser's
    clock where it does nothing else."""
    process = psutil.Process(studio["now"].process.pid)
    for place in ("/", "/runs", "/adapters", "/data", "/chat", "/train", "/compare"):
        wall, own = [], []
        for _ in range(7):
            before = sum(process.cpu_times()[:2])
            wall.append(page.evaluate(FETCH, place))
            own.append(1000 * (sum(process.cpu_times()[:2]) - before))
        assert median(own) < 100, (place, own)
        assert median(wall) < 100 or os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1), (place, wall)
