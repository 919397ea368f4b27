"""Adapters and comparisons without a browser: shown, taken in, taken out, turned into others."""

from __future__ import annotations

import io
import re
import zipfile

from studio_helpers import WEIGHTS, an_adapter, parses, until

from graftlm.studio import records
from graftlm.studio.views.adapters import MAKES
from graftlm.studio.views.compare import METHODS


def test_adapters_are_shown_packed_and_turned_into_others(browser, made):
    folder = an_adapter(made)
    assert "/adapters/mine" in browser.get("/adapters").text
    page = browser.get("/adapters/mine").text
    assert "LORA" in page and "# A card &lt;b&gt;" in page
    packed = zipfile.ZipFile(io.BytesIO(browser.get("/adapters/mine/zip").content))
    assert packed.testzip() is None and packed.read("mine/adapter_model.safetensors") == WEIGHTS
    assert browser.get("/adapters/mine/files/adapter_model.safetensors").content == WEIGHTS
    for step in (50, 100):
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}" / "adapter_config.json").write_text("{}")
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    (folder / "checkpoint-150").mkdir()  # is being written
    (folder / "checkpoint-150" / "adapter_config.json").write_text("{}")
    for place in ("/adapters/mine", "/runs/mine"):
        page = browser.get(place).text
        assert page.index("checkpoint-50&") < page.index("checkpoint-100&") and "checkpoint-150" not in page
    for bad in ("job.json", "..%2f..%2fkey", "nothing"):
        assert browser.get(f"/adapters/mine/files/{bad}").status_code == 404
    (folder / "loss.png").symlink_to(made.workspace.own / "key")
    assert browser.get("/adapters/mine/files/loss.png").status_code == 403
    assert browser.get("/adapters/mine/zip").status_code == 403
    for what, rank, more in (
        ("merge", "", []), ("convert", "", ["--rank", "16"]), ("convert", "0.95", ["--rank", "0.95"]), ("vllm", "", []),
        ("vllm", "8", ["--rank", "8"]), ("gguf", "8", []),
    ):  # fmt: skip
        place = browser.post("/adapters/mine/make", data={"what": what, "rank": rank}).headers["hx-redirect"]
        name = place.rpartition("/")[2]
        args = records.read(made.workspace.run(name) / "job.json")["args"]
        assert args[args.index("--output") :] == ["--output", f"runs/{name}/out", "--base", "graftlm-base", *more], what
        assert args[: args.index("runs/mine")] == MAKES[what] and parses(args)
    ours = records.read(folder / "adapter_config.json")
    records.write(folder / "adapter_config.json", {**ours, "peft_type": "IA3"})  # vLLM has no such, so it becomes a LoRA
    place = browser.post("/adapters/mine/make", data={"what": "vllm"}).headers["hx-redirect"]
    assert records.read(made.workspace.run(place.rpartition("/")[2]) / "job.json")["args"][-2:] == ["--rank", "16"]
    for bad in ({"what": "--help"}, {"what": "convert", "rank": "--to"}):
        assert browser.post("/adapters/mine/make", data=bad).status_code == 422
    assert browser.get("/adapters/mine-merge").status_code == 404
    until(lambda: not made.jobs.advance() and not made.jobs.going())


def test_a_checkpoint_becomes_an_adapter(browser, made):
    """Also of a run that has no adapter of its own (yet)."""
    folder = made.workspace.new_run("going")
    (folder / "settings.yaml").write_text("base: their/base\n")
    elsewhere(folder / "checkpoint-5")
    assert browser.post("/adapters/going/checkpoints/checkpoint-5").status_code == 404  # is being written
    (folder / "checkpoint-5" / "trainer_state.json").write_text("{}")
    assert "/adapters/going/checkpoints/checkpoint-5" in browser.get("/runs/going").text
    place = browser.post("/adapters/going/checkpoints/checkpoint-5").headers["hx-redirect"]
    assert place == "/adapters/going-checkpoint-5" and "their/base" in browser.get(place).text
    assert (made.workspace.run("going-checkpoint-5") / "adapter_model.safetensors").read_bytes() == WEIGHTS
    for bad in ("checkpoint-6", "..%2fgoing"):
        assert browser.post(f"/adapters/going/checkpoints/{bad}").status_code == 404


def test_what_a_job_made_is_packed_and_used(browser, made):
    folder = made.workspace.new_run("mine-merge")
    records.write(folder / "job.json", {"kind": "merge", "args": []})
    records.write(folder / "state.json", {"state": "done"})
    assert browser.get("/runs/mine-merge/zip").status_code == 404
    (folder / "out").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / "out" / name).write_text("{}")
    page = browser.get("/runs/mine-merge").text
    assert "The files are in runs/mine-merge/out." in page and "/chat?base=runs/mine-merge/out" in page
    assert 'value="runs/mine-merge/out"' not in browser.get("/chat").text
    assert "<option selected>runs/mine-merge/out" in browser.get("/chat?base=runs/mine-merge/out").text
    names = zipfile.ZipFile(io.BytesIO(browser.get("/runs/mine-merge/zip").content)).namelist()
    assert names == ["mine-merge/config.json", "mine-merge/model.safetensors"]
    (folder / "out" / "key").symlink_to(made.workspace.own / "key")
    assert browser.get("/runs/mine-merge/zip").status_code == 403


def test_an_adapter_is_copied_into_a_folder(browser, made, tmp_path):
    an_adapter(made)
    text = browser.post("/adapters/mine/folder", data={}).text
    assert "exports/mine" in text and (made.workspace.root / "exports" / "mine" / "README.md").exists()
    given = tmp_path / "given" / "mine"
    browser.post("/adapters/mine/folder", data={"path": str(given)})
    assert (given / "adapter_model.safetensors").read_bytes() == WEIGHTS
    for path, status in {str(given): 409, str(tmp_path / "other" / "x"): 403, "../x": 403, ".studio/x": 403}.items():
        assert browser.post("/adapters/mine/folder", data={"path": path}).status_code == status, path


def elsewhere(folder, **config) -> None:
    """An adapter as HF PEFT saves it."""
    folder.mkdir(parents=True)
    records.write(folder / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "their/base"} | config)
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)


def as_zip(*files: tuple[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as packed:
        for name, content in files:
            packed.writestr(name, content)
    return out.getvalue()


def test_adapters_from_elsewhere_are_taken_in(browser, made, tmp_path):
    theirs = tmp_path / "given" / "theirs"
    elsewhere(theirs)
    (theirs / "optimizer.bin").write_bytes(b"x")
    assert browser.post("/adapters/point", data={"path": str(theirs)}).headers["hx-redirect"] == "/adapters/theirs"
    page = browser.get("/adapters/theirs").text
    assert "their/base" in page and "optimizer" not in page and "theirs" in browser.get("/chat").text
    row = made.index.run("theirs")
    assert (row.method, row.base, row.kind, row.state) == ("lora", "their/base", "import", "done")
    assert "Repeat" not in browser.get("/runs/theirs").text
    again = browser.post("/adapters/point", data={"path": str(theirs), "base": "graftlm-base"}).headers["hx-redirect"]
    assert again == "/adapters/theirs-2" and made.index.run("theirs-2").base == "graftlm-base"
    config = (theirs / "adapter_config.json").read_bytes()
    content = as_zip(("../../x/adapter_config.json", config), ("a/adapter_model.safetensors", WEIGHTS), ("a/x.py", b"1"))
    place = browser.post("/adapters/upload", files={"file": ("My zip.zip", content)}).headers["hx-redirect"]
    folder = made.workspace.run(place.rpartition("/")[2])
    assert folder.name == "My-zip" and {p.name for p in folder.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "origin.json",
    }  # fmt: skip
    assert not list(made.workspace.own.glob("*.zip"))


def test_a_base_outside_is_not_read_whoever_names_it(browser, made, tmp_path):
    """Neither one that an adapter from elsewhere names, nor a link."""
    elsewhere(tmp_path / "given" / "evil", base_model_name_or_path=str(tmp_path / "other"))
    browser.post("/adapters/point", data={"path": str(tmp_path / "given" / "evil")})
    (made.workspace.root / "link").symlink_to(tmp_path / "other")
    answers = [
        browser.post("/adapters/evil/make", data={"what": "merge"}), browser.post("/adapters/evil/load"),
        browser.post("/chat/send", data={"base": "link", "adapter": "", "message": "hi"}),
        browser.post("/data/tweets/look", data={"base": "link"}),
        browser.post("/adapters/point", data={"path": str(tmp_path / "given" / "evil"), "base": "link"}),
    ]  # fmt: skip
    assert all(a.status_code == 403 and "outside" in a.text for a in answers)
    assert not made.jobs.going() and not made.server.running


def test_adapters_that_cannot_be_taken_in_say_why_and_leave_nothing(browser, made, tmp_path):
    given = tmp_path / "given"
    elsewhere(given / "pickled")
    (given / "pickled" / "adapter_model.safetensors").rename(given / "pickled" / "adapter_model.bin")
    elsewhere(given / "cut")
    (given / "cut" / "adapter_model.safetensors").write_bytes(WEIGHTS[:9])
    elsewhere(given / "nameless", peft_type=None)
    elsewhere(given / "linked")
    (given / "linked" / "README.md").symlink_to(tmp_path / "other" / "rows.jsonl")
    (given / "empty").mkdir()
    for name, said in {
        "pickled": "Pickled", "cut": "no safetensors file", "nameless": "peft_type", "linked": "outside",
        "empty": "no adapter", "nothing": "does not exist", "../other": "outside",
    }.items():  # fmt: skip
        answer = browser.post("/adapters/point", data={"path": str(given / name)})
        assert 400 <= answer.status_code < 500 and said in answer.text, name
    for name, content, said in (
        ("a.zip", b"PK", "no zip"), ("a.zip", as_zip(("x/key", b"")), "no adapter"), ("a.tar", b"", "Choose a zip"),
    ):  # fmt: skip
        answer = browser.post("/adapters/upload", files={"file": (name, content)})
        assert answer.status_code == 422 and said in answer.text, name
    assert not list(made.workspace.runs.iterdir()) and not list(made.workspace.own.glob("*.zip"))


def test_all_methods_can_be_chosen():
    """In the form, and in comparisons but for two, which need options of their own."""
    from graftlm.studio import forms
    from graftlm.training.defaults import QUANTIZED, method_names

    known = {*method_names(), *QUANTIZED}
    (method,) = [f for f in forms.fields() if f["key"] == "method"]
    assert {*method["choices"]} == known and known - {*METHODS} == {"multitask-prompt-tuning", "trainable-tokens"}
    assert {*METHODS} < known and forms.option_fields("qlora") == forms.option_fields("lora") != []


def test_comparisons(browser, made, tmp_path):
    form = {"base": "graftlm-base", "data": "quotes", "method": ["lora", "ia3"], "steps": "5"}
    for bad, status in (
        ({"method": ["nothing"]}, 422), ({"steps": "x"}, 422), ({"data": str(tmp_path / "other")}, 403),
        ({"data": "--help"}, 422),
    ):  # fmt: skip
        assert browser.post("/compare/start", data=form | bad).status_code == status, bad
    name = browser.post("/compare/start", data=form).headers["hx-redirect"].rpartition("/")[2]
    folder = made.workspace.run(name)
    args = records.read(folder / "job.json")["args"]
    assert args[-6:] == ["--method", "lora", "--method", "ia3", "--max-steps", "5"] and parses(args)
    until(lambda: not made.jobs.advance() and not made.jobs.going())
    assert browser.get(f"/compare/{name}").status_code == 404
    (folder / "out").mkdir()
    (folder / "out" / "report.html").write_text("<p>the report<script>alert(1)</script>")
    assert "sandbox" in browser.get(f"/compare/{name}").text
    policy = browser.get(f"/compare/{name}/report").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "sandbox" in policy and "script-src" not in policy


def test_runs_beside_each_other(browser, made):
    an_adapter(made, "one")
    other = an_adapter(made, "two")
    (other / "recipe.yaml").write_text("method: ia3\nbase: graftlm-base\ntraining: {seed: 1, epochs: 3}\n")
    text = browser.get("/compare/runs?run=one&run=two").text
    assert "<code>method</code>" in text and "<code>training.seed</code>" not in text and "data-curve" in text
    assert re.search(r"<code>training.epochs</code></th><td[^>]*><span class=\"dim\">default</span></td><td[^>]*>3<", text)
    assert browser.get("/compare/runs?run=one").status_code == 422
    assert browser.get("/compare/runs?run=one&run=nothing").status_code == 404
