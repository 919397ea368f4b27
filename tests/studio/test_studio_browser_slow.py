"""The studio in a real browser, with real processes: whole ways through it, each of which takes long."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
import zipfile

import psutil
import pytest
import yaml
from studio_browser import LONG, TINY, begin, home, ready, state, tiny_base, trained
from studio_helpers import Process, until

from graftlm.bundled import available
from graftlm.studio import records

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
expect = playwright.expect
pytestmark = pytest.mark.slow

STEPS = "training: {{max_steps: {steps}, seed: {seed}, save_strategy: steps, eval_strategy: 'no', interval: 5}}\n"
PROMPT = "Tweet text : my train was late again Label :"


def step(page) -> int:
    """The step that a run's page shows."""
    return int(page.locator("#step").inner_text().split()[0])


def test_three_clicks_to_the_end(page, studio):
    """An example as it is, Train, and at its end a chat."""
    page.click("#example-tweets")
    ready(page)
    page.click("#start")
    page.wait_for_url("**/runs/*")
    page.locator("#state .badge.done").wait_for(timeout=20 * LONG)
    measures = page.locator("#state dl").inner_text()
    before, after = re.search(r"Held-out loss\s+([\d.]+) → ([\d.]+)", measures).groups()
    assert float(after) < float(before)
    for fact in ("Tokens a second", "Memory", "Time taken", "Held-out accuracy"):
        assert fact in measures
    page.click("#to-chat")
    page.fill("#message", PROMPT)
    page.click("#send")
    expect(page.locator(".answer button")).to_have_count(2, timeout=LONG)


def test_two_runs_are_queued_cancelled_and_resumed(page, studio):
    """One goes on and others wait; one is cancelled; one fits beside by the plan; one is stopped, and resumed."""
    first, second, third = (begin(page, TINY + STEPS.format(steps=40_000, seed=seed)) for seed in (1, 2, 3))
    state(page, "waiting")
    page.click("#stop")
    state(page, "stopped")
    page.goto(f"{home(page)}/runs/{second}")
    expect(page.locator("#state")).to_contain_text("it fits beside what goes on", timeout=LONG)
    page.click("#beside")
    state(page, "running")
    page.click("#stop")
    state(page, "stopped")
    page.goto(f"{home(page)}/runs/{first}")
    expect(page.locator("#step")).to_contain_text(re.compile(r"\d+ of 40000"), timeout=LONG)
    until(lambda: step(page) > 20, 600)
    page.click("#stop")
    state(page, "stopped")
    reached = step(page)
    page.click("#resume")
    state(page, "running")
    until(lambda: page.locator("#step").count() and step(page) > reached, 600)
    page.click("#stop")
    state(page, "stopped")
    assert len({first, second, third}) == 3


def test_a_reload_a_closed_tab_and_a_killed_studio_in_the_midst_of_training(page, studio):
    """The steps go on meanwhile, are shown live again, and the run's end stands in every list at once. (That one runs to its
    last step over a killed studio is in test_studio_browser.py; this one has more steps than any machine makes in it.)"""
    name = begin(page, TINY + STEPS.format(steps=1_000_000, seed=1))
    expect(page.locator("#step")).to_contain_text("of 1000000", timeout=LONG)
    expect(page.locator("#curve canvas")).to_be_visible()
    before = step(page)
    page.reload()
    until(lambda: step(page) > before, 600)
    place, context, port, reached = page.url, page.context, studio["now"].port, step(page)
    page.close()
    studio["now"].kill()
    studio["now"] = Process(studio["root"], port, "--folder", str(studio["given"]))
    again = context.new_page()
    again.set_default_timeout(LONG)
    again.goto(place)
    state(again, "running")
    assert step(again) > reached and json.loads(again.get_attribute("#curve", "data-curve"))["step"][0] <= before
    before = step(again)
    until(lambda: step(again) > before, 600)
    again.click("#stop")
    state(again, "stopped")
    for where in (f"/runs?q={name}", "/"):
        again.goto(home(again) + where)
        assert again.locator("tbody tr", has_text=name).locator(".badge").inner_text() == "stopped"


def test_runs_train_together(page, studio):
    """Two recipes put beside each other are one process; each has its page and its adapter, and they are compared."""
    second = TINY + "method: ia3\ntraining: {max_steps: 3, eval_strategy: epoch, seed: 2}\n"
    name = begin(page, second, TINY + "training: {max_steps: 3, eval_strategy: epoch}\n")
    state(page, "done")
    expect(page.locator("#state")).to_contain_text("Trains together with")
    other = page.locator("#state p a").first.inner_text()
    page.goto(f"{home(page)}/runs/{other}")
    state(page, "done")
    expect(page.locator("#log")).to_contain_text(f"runs/{name}: done")
    page.select_option("select[name=run]", name)
    page.click("#compare")
    expect(page.locator(".chart canvas")).to_be_visible()
    rows = page.locator("tbody th code").all_inner_texts()
    assert "method" in rows and "training.seed" in rows and "base" not in rows
    for made in (name, other):
        assert (studio["root"] / "runs" / made / "adapter_model.safetensors").exists()


def test_a_plan_that_does_not_fit_is_changed_by_a_click(page, studio):
    """A base (its configuration is enough for a plan) whose weights take two thirds of the free memory in fp32: loading them
    takes twice as much, which is not there, and half of it is."""
    folder = studio["root"] / "bases" / "large"
    shutil.copytree(studio["root"] / "bases" / "tiny", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = records.read(folder / "config.json")
    layer = 4 * (4 * 8192**2 + 3 * 8192 * 28672)  # bytes
    config |= {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 64}
    config |= {"head_dim": 128, "num_hidden_layers": int(0.65 * psutil.virtual_memory().available / layer)}
    records.write(folder / "config.json", config)
    page.goto(home(page) + "/train")
    ready(page)
    text = "base: bases/large\ndtype: fp32\ndata: {source: tweets}\n"
    page.fill("#yaml", text)
    expect(page.locator("#plan > p").first).to_contain_text("Does not fit", timeout=2 * LONG)
    page.locator("#plan li", has=page.locator(".fits")).locator("button").click()
    expect(page.locator("#plan > p").first).to_contain_text("Fits", timeout=2 * LONG)
    changed = yaml.safe_load(page.input_value("#yaml"))
    assert changed == yaml.safe_load(text) | {"dtype": "bf16"} and page.input_value("#f-dtype") == "bf16"
    page.fill("#yaml", text + "methd: lora\n")
    expect(page.locator("#problems")).to_contain_text("did you mean 'method'")
    expect(page.locator("#plan")).to_have_text("Not planned yet.")  # not the plan of another recipe


def test_the_keyboard_is_enough(page):
    """From the first page to a run that is done."""
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    tab_to(page, "example-tweets", 3)
    page.keyboard.press("Enter")
    page.wait_for_url("**/train?example=tweets")
    ready(page)
    page.focus("#yaml")
    page.keyboard.press("Control+A")
    page.keyboard.type(TINY + "training:\n  max_steps: 2\n")
    expect(page.locator('[id="f-training.max_steps"]')).to_have_value("2")
    tab_to(page, "start", 12)
    page.keyboard.press("Enter")
    page.wait_for_url("**/runs/*")
    state(page, "done")
    page.locator("#main").focus()
    tab_to(page, "to-chat", 6)
    page.keyboard.press("Enter")
    page.wait_for_url("**/chat?adapter=*")


def tab_to(page, name: str, most: int) -> None:
    """Press Tab until an element has the focus, and at most so often."""
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == name:
            return
    raise AssertionError(f"{name} is not reached by {most} times Tab")


def their_adapter(studio) -> str:
    """An adapter over the tiny base as HF PEFT saves it, in the folder that was given; its name."""
    folder = studio["given"] / "theirs"
    code = (
        "import sys, torch, peft, transformers; torch.manual_seed(1)\n"
        "base = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "targets = ['q_proj', 'v_proj']\n"
        "config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type='CAUSAL_LM')\n"
        "peft.get_peft_model(base, config).save_pretrained(sys.argv[2])\n"
    )
    if not folder.exists():
        subprocess.run([sys.executable, "-c", code, str(studio["root"] / "bases" / "tiny"), str(folder)], check=True)
    return folder.name


def test_three_answer_side_by_side(page, studio):
    """The base, an adapter of ours, and one that HF PEFT saved, in one batch; a vote is kept, and is learnt from."""
    pytest.importorskip("peft", reason="HF PEFT is not installed")
    ours, theirs = trained(page, studio["root"]), their_adapter(studio)
    page.goto(home(page) + "/adapters")
    page.fill("input[name=path]", str(studio["given"] / theirs))
    page.select_option("form[hx-post='/adapters/point'] select", "bases/tiny")
    page.click("text=Take it in")
    page.wait_for_url("**/adapters/theirs")
    page.click("text=Chat with it")
    page.check(f'input[name="adapter"][value="{ours}"]')
    page.click("summary")
    settings = {"top_k": "5", "repetition_penalty": "1.1", "seed": "3", "max_tokens": "8", "system": "Be kind."}
    for key, value in settings.items():
        page.fill(f"[name={key}]", value)
    page.fill("#message", PROMPT)
    page.click("#send")
    expect(page.locator(".answer button")).to_have_count(3, timeout=LONG)
    assert page.locator(".answer").count() == 3 and page.locator("#turns > *").count() == 1  # each piece in its place
    texts = page.locator(".answer .text").all_inner_texts()
    names = page.locator(".answer h3").all_inner_texts()
    assert set(names) == {"base", ours, "theirs"} and texts[names.index("theirs")] != texts[names.index("base")]
    page.locator(".answer button").nth(names.index("theirs")).click()
    expect(page.locator(".answer.best h3")).to_have_text("theirs")
    page.goto(home(page) + "/chat")
    page.click("section[aria-labelledby=earlier] a")
    expect(page.locator(".answer.best h3")).to_have_text("theirs")
    assert page.input_value("[name=top_k]") == "5" and page.input_value("[name=system]") == "Be kind."
    page.click("#as-rows")
    page.wait_for_url("**/data/*.jsonl")
    expect(page.locator("#rows h2").first).to_contain_text("chat", timeout=LONG)


def made(page, studio, name: str, what: str) -> str:
    """Make something of an adapter from its page; the run that made it."""
    page.goto(f"{home(page)}/adapters/{name}")
    page.click(f"#make-{what}")
    page.wait_for_url("**/runs/*")
    page.locator("#state .badge.done, #state .badge.failed").wait_for(timeout=LONG)
    expect(page.locator("#state .badge")).to_have_text("done")
    return page.url.rpartition("/")[2]


def test_adapters_are_merged_converted_exported_and_loaded(page, studio, tmp_path):
    root = studio["root"]
    name = trained(page, root)
    merged = made(page, studio, name, "merge")
    assert (root / "runs" / merged / "out" / "model.safetensors").exists()
    with page.expect_download() as download:
        page.click("#zip")
    names = zipfile.ZipFile(download.value.path()).namelist()
    assert f"{merged}/model.safetensors" in names and f"{merged}/tokenizer.json" in names
    converted = made(page, studio, name, "convert")
    assert (root / "runs" / converted / "adapter_model.safetensors").exists()
    page.goto(f"{home(page)}/adapters/{converted}")
    expect(page.locator("dl").first).to_contain_text("bases/tiny")
    vllm = made(page, studio, name, "vllm")
    assert list((root / "runs" / vllm / "out").rglob("adapter_model.safetensors"))
    page.goto(f"{home(page)}/adapters/{name}")
    page.fill("form[hx-post$='/folder'] input", str(studio["given"] / "copied"))
    page.click("#folder")
    expect(page.locator("#put-out")).to_contain_text("copied")
    assert (studio["given"] / "copied" / "adapter_config.json").exists()
    with page.expect_download() as download:
        page.click("#zip")
    assert zipfile.ZipFile(download.value.path()).testzip() is None
    page.click("#load")
    expect(page.locator("#server")).to_contain_text(f"{name} is loaded into the server.", timeout=LONG)
    address, key = (page.locator("#server dd code").nth(i).inner_text() for i in (0, 1))
    asked = page.request.get(f"{address}/models", headers={"Authorization": f"Bearer {key}"})
    assert name in {model["id"] for model in asked.json()["data"]}


def test_an_adapter_becomes_gguf_where_llama_cpp_has_its_tokenizer(page, studio):
    """Over a base with SmolLM2's tokenizer; over the bundled base the run's page says what else is possible."""
    if not available("smollm2"):
        pytest.skip("SmolLM2 is not installed")
    root = studio["root"]
    tiny_base(root / "bases" / "smol", "smollm2")
    name = begin(page, TINY.replace("tiny", "smol") + "training: {max_steps: 2, eval_strategy: 'no', save_strategy: 'no'}\n")
    state(page, "done")
    (file,) = (root / "runs" / made(page, studio, name, "gguf") / "out").glob("*.gguf")
    assert file.read_bytes()[:4] == b"GGUF"
    with page.expect_download() as download:
        page.click("#zip")
    assert any(n.endswith(file.name) for n in zipfile.ZipFile(download.value.path()).namelist())
    page.goto(f"{home(page)}/adapters/{trained(page, root)}")
    page.click("#make-gguf")
    page.wait_for_url("**/runs/*")
    state(page, "failed")
    expect(page.locator("#state .wrong")).to_contain_text("graftlm merge writes the model")


def test_methods_are_compared(page, studio):
    """A comparison from its form to the report in the page."""
    page.goto(home(page) + "/compare")
    page.select_option("select[name=base]", "bases/tiny")
    for box in page.locator("input[name=method]").all():
        box.set_checked(box.get_attribute("value") in ("lora", "ia3"))
    page.fill("[name=steps]", "2")
    page.locator("main button.main").click()
    page.wait_for_url("**/runs/*")
    page.locator("#state .badge.done, #state .badge.failed").wait_for(timeout=2 * LONG)
    page.click("text=Report")
    report = page.frame_locator("iframe")
    expect(report.locator("body")).to_contain_text("ia3")
    assert page.evaluate("document.querySelector('iframe').contentDocument") is None  # of no origin: nothing runs in it


def test_the_watcher_is_cheap_while_a_run_goes_on(page, studio):
    """The studio's own processor time during a real training, with the run's page open and without: below 2 % of a core."""
    begin(page, "data: {source: tweets}\n" + STEPS.format(steps=4000, seed=1).replace("interval: 5", "interval: 500"))
    expect(page.locator("#step")).to_contain_text("of 4000", timeout=LONG)
    own, spent = psutil.Process(studio["now"].process.pid), {}
    for what in ("open", "closed"):
        if what == "closed":
            place = page.url
            page.goto("about:blank")
        before, begun = sum(own.cpu_times()[:2]), time.monotonic()
        time.sleep(30)
        spent[what] = (sum(own.cpu_times()[:2]) - before) / (time.monotonic() - begun)
    page.goto(place)
    page.click("#stop")
    state(page, "stopped")
    print(spent)
    assert max(spent.values()) < 0.02, spent
