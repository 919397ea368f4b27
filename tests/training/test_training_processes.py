"""Several processes of one run: who prints and saves, and that they train what one process trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import save_base, save_tweets

from graftlm import processes
from graftlm.errors import UnsupportedError
from graftlm.training import Recipe, run, train_together
from graftlm.training.recipes import only_the_first_speaks
from graftlm.training.search import with_best_rate
from graftlm.training.trainer import log


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process as the second of two, before they know each other."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")


def test_one_process_is_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (processes.count(), processes.index(), processes.is_first()) == (1, 0, True)
    monkeypatch.setenv("RANK", "3")  # a scheduler's own, without a number of processes
    assert processes.is_first()
    processes.wait()


def test_only_the_first_speaks(second: None, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture) -> None:
    assert (processes.count(), processes.index(), processes.is_first()) == (2, 1, False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with only_the_first_speaks():
            print("a notice")
            log.warning("a line")
            warnings.warn("a warning", stacklevel=1)
    assert capsys.readouterr().out == "" and not caplog.records
    os.environ["RANK"] = "0"
    with only_the_first_speaks():
        print("a notice")
        log.warning("a line")
    assert capsys.readouterr().out == "a notice\n" and [r.message for r in caplog.records] == ["a line"]


def test_runs_that_train_together_are_one_process(second: None) -> None:
    with pytest.raises(UnsupportedError, match="2 processes were started.*one recipe"):
        train_together([Recipe()])


def test_a_search_is_one_process(second: None) -> None:
    with pytest.raises(UnsupportedError, match="--budget.*one process, and 2 were started"):
        with_best_rate(Recipe.from_dict({"training": {"learning_rate": "search"}}), None, None, None, print)


def test_other_commands_are_one_process(second: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from graftlm import cli

    monkeypatch.setattr(cli, "OTHERS_WAIT", 0)
    result = CliRunner().invoke(cli.app, ["compare", "--data", "tweets"])
    assert result.exit_code == 2
    assert "Process 1:" in result.stderr and "graftlm compare runs in one process, and 2 were started" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_train_what_one_does(accumulation: int, tmp_path: Path) -> None:
    """Half of each batch a process: the same adapter and held-out loss, one table, one set of files."""
    save_base(tmp_path / "base")
    save_tweets(tmp_path / "tweets")
    training = {"epochs": 2, "learning_rate": 0.02, "logging_steps": 1, "threads": 1, "accumulation": accumulation}
    recipe = Recipe.from_dict(
        {"base": str(tmp_path / "base"), "data": {"source": str(tmp_path / "tweets")}, "output_dir": str(tmp_path / "two"),
         "training": training | {"batch_size": 2}, "method_options": {"lora_dropout": 0.0}}
    )  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone"]
    command = [*launcher, "-m", "graftlm", "train", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Saved in") == done.stdout.count("held-out loss") == 1
    assert done.stderr.count("train loss") == 2  # a line an epoch

    alone = run(recipe.replace("training.batch_size=4", output_dir=str(tmp_path / "one")), quiet=True)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-4)
    written = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert written["metrics"]["loss"] == pytest.approx(alone.metrics["loss"], rel=1e-4)
    for key in ("eval_loss", "epoch_train_loss"):
        both = ([e[key] for e in history if key in e] for history in (written["history"], alone.history))
        assert next(both) == pytest.approx(next(both), rel=1e-4), key
    assert {p.name for p in (tmp_path / "two").iterdir()} == {p.name for p in (tmp_path / "one").iterdir()}
