"""`progress.jsonl`: what a run writes for those who watch, which changes nothing of the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from training_helpers import Kill, equal, save_base, save_tweets

from graftlm.training import Recipe, live, run, train_together

STEPS = 6  # 12 rows, batches of 4, 2 epochs


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_base(folder / "base")
    save_tweets(folder / "tweets")
    return folder


@pytest.fixture(autouse=True)
def each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "PAUSE", 0.0)
    monkeypatch.setattr(live, "SHARE", 0.0)


def recipe(place: Path, output: Path, **values) -> Recipe:
    training = {"epochs": 2, "batch_size": 4, "learning_rate": 0.02, "logging_steps": 1, "threads": 1}
    start = {"base": str(place / "base"), "data": {"source": str(place / "tweets")}, "training": training}
    return Recipe.from_dict(start | {"output_dir": str(output)} | values)


def events(folder: Path, kind: str = "") -> list[dict]:
    found = [json.loads(line) for line in (folder / live.PROGRESS_NAME).read_text(encoding="utf-8").splitlines()]
    return [e for e in found if not kind or e["event"] == kind]


def test_it_tells_each_step_and_changes_nothing(place: Path, tmp_path: Path) -> None:
    plain = run(recipe(place, tmp_path / "plain"), quiet=True)
    told = run(recipe(place, tmp_path / "told"), quiet=True, progress=True)
    assert not (tmp_path / "plain" / live.PROGRESS_NAME).exists()
    weights = [load_file(tmp_path / n / "adapter_model.safetensors") for n in ("plain", "told")]
    assert equal(*weights) and plain.metrics["loss"] == told.metrics["loss"]
    found = events(tmp_path / "told")
    assert found[0] | {"time": 0} == {"event": "begin", "step": 0, "steps": STEPS, "epochs": 2, "time": 0}
    assert found[-1] == {"event": "end", "step": STEPS}
    steps = [e for e in found if e["event"] == "step"]
    assert [e["step"] for e in steps] == list(range(1, STEPS + 1))
    logged = {e["step"]: e["loss"] for e in told.history if "loss" in e}
    for e in steps:
        assert e["loss"] == pytest.approx(logged[e["step"]], rel=1e-3) and e["tokens_per_second"] > 0 and e["memory"] > 0
    measured = {e["step"]: e["eval_loss"] for e in told.history if "eval_loss" in e}
    evaluations = [e for e in found if e["event"] == "evaluation"]
    assert {e["step"]: e["loss"] for e in evaluations} == measured and len(measured) == 2
    assert all(set(s) == {"prompt", "target", "text"} for e in evaluations for s in e["samples"])
    assert all(len(e["samples"]) == 2 for e in evaluations)


def test_a_resumed_run_goes_on_in_the_file(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="killed"):
        run(recipe(place, out), callbacks=[Kill(5)], quiet=True, progress=True)
    assert [e["step"] for e in events(out, "step")] == [1, 2, 3, 4, 5]
    with (out / live.PROGRESS_NAME).open("a") as file:
        file.write('{"event": "st')  # cut off with the process
    run(recipe(place, out, resume=True), quiet=True, progress=True)
    assert [e["step"] for e in events(out, "step")] == list(range(1, STEPS + 1))
    assert [e["step"] for e in events(out, "begin")] == [0, 3]
    whole = tmp_path / "whole"
    run(recipe(place, whole), quiet=True, progress=True)
    for a, b in zip(events(out, "step"), events(whole, "step"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_runs_that_train_together_write_a_file_each(place: Path, tmp_path: Path) -> None:
    outs = [tmp_path / n for n in ("one", "two")]
    train_together([recipe(place, out) for out in outs], quiet=True, progress=True)
    for out in outs:
        assert [e["step"] for e in events(out, "step")] == list(range(1, STEPS + 1))


def test_long_runs_write_rarely(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "PAUSE", 1e6)
    run(recipe(place, tmp_path / "out"), quiet=True, progress=True)
    (only,) = events(tmp_path / "out", "step")
    assert only["step"] == STEPS and only["loss"] > 0  # the mean since the beginning
