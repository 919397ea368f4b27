"""`graftlm train` and `graftlm evaluate`."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import typer
from training_helpers import save_base, save_tweets
from typer.testing import CliRunner

from graftlm.cli.evaluate import evaluate
from graftlm.cli.train import FLAGS, train
from graftlm.errors import RecipeError

app = typer.Typer()
app.command()(train)
app.command()(evaluate)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    save_base(folder / "base")
    save_tweets(folder / "tweets")
    return folder


def invoke(*args: str | Path):
    return CliRunner().invoke(app, [str(a) for a in args], env={"COLUMNS": "160"})


def test_train_and_evaluate(place: Path, tmp_path: Path) -> None:
    flags = ["--base", place / "base", "--data", place / "tweets", "--epochs", 1, "--lr", 0.02, "--output", tmp_path / "out"]
    done = invoke("train", *flags, "--set", "training.threads=1", "--quiet")
    assert done.exit_code == 0, done.output
    assert "held-out loss" in done.output and "trainable parameters" in done.output
    measured = invoke(
        "evaluate", "--base", place / "base", "--data", place / "tweets", "--adapter", tmp_path / "out", "--json"
    )
    rows = json.loads(measured.stdout)
    assert rows[str(tmp_path / "out")]["loss"] < rows["base"]["loss"] and rows["base"]["examples"] == 6
    table = invoke("evaluate", "--base", place / "base", "--data", place / "tweets")
    assert table.exit_code == 0 and "perplexity" in table.output and "accuracy" in table.output


def test_recipe_file_with_flags_over_it(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("method: bottleneck\ntraining: {epochs: 5, seed: 1}\n")
    shown = invoke("train", path, "--epochs", 2, "--set", "training.seed=3", "--show-recipe").output
    assert "method: bottleneck" in shown and "epochs: 2" in shown and "seed: 3" in shown


def test_every_flag_stands_for_a_field_of_the_recipe() -> None:
    from graftlm.training import Recipe

    values = Recipe().model_dump()
    for key in FLAGS.values():
        part, _, rest = key.partition(".")
        assert (rest in values[part]) if rest else part in values


def test_mistakes_raise_a_recipe_error() -> None:
    done = invoke("train", "--set", "trainig.epochs=3")
    assert isinstance(done.exception, RecipeError) and "did you mean 'training'" in str(done.exception)


def test_ctrl_c_leaves_with_130_and_resumes(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graftlm.training import Trainer

    step = Trainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 1 and not self.stop.asked:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    flags = ["--base", place / "base", "--data", place / "tweets", "--steps", 4, "--output", tmp_path / "out", "--quiet"]
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "training_step", interrupted)
        done = invoke("train", *flags)
    assert done.exit_code == 130 and "--resume" in done.output
    assert (tmp_path / "out" / "adapter_model.safetensors").exists() and (tmp_path / "out" / "checkpoint-2").exists()
    again = invoke("train", *flags, "--resume")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "out" / "checkpoint-4").exists()
