"""Runs that train together follow the same trajectories as alone."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import build
from transformers import AutoTokenizer, TrainerCallback
from typer.testing import CliRunner

import graftlm
from graftlm import cli
from graftlm.bundled import base_path
from graftlm.errors import DivergedError, RecipeError
from graftlm.kernels import linear
from graftlm.training import Recipe, Together, TrainingInterrupted, resolve_base, run, train_together

DATA = {"source": "tweets", "max_examples": 48, "max_eval_examples": 6}
PLACE: dict[str, str] = {}  # the tiny base of all recipes


@pytest.fixture(scope="module", autouse=True)
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two layers, with the bundled base's tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    build("bloom", vocab_size=16384, pad_token_id=3).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_path()).save_pretrained(folder)
    PLACE["base"] = str(folder)
    return str(folder)


def recipe(folder: Path, name: str, method: str = "lora", options: dict | None = None, **training: Any) -> Recipe:
    settings = {
        "max_steps": 6,
        "batch_size": 4,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 1,
        **training,
    }
    attention = {"target_modules": ["query_key_value"]} if method == "lora" else {}
    values = {"method": method, "method_options": attention | (options or {}), "data": DATA, "training": settings}
    return Recipe.from_dict(values | PLACE | {"output_dir": str(folder / name)})


def crowd(folder: Path) -> list[Recipe]:
    """Runs that differ in everything that may differ."""
    return [
        recipe(folder, "lora", options={"r": 4}, learning_rate=1e-3),
        recipe(folder, "dropped", options={"r": 8, "lora_dropout": 0.2}, seed=3, batch_size=3, max_steps=9),
        recipe(folder, "prompt", "prompt-tuning", {"num_virtual_tokens": 5}, batch_size=6, max_grad_norm=0.1),
        recipe(folder, "prefix", "prefix-tuning", {"num_virtual_tokens": 4, "prefix_projection": True}, accumulation=2),
        recipe(folder, "p", "p-tuning", {"num_virtual_tokens": 3}, schedule="cosine", warmup_ratio=0.3, max_steps=3),
        recipe(
            folder, "bottleneck", "bottleneck", {"dropout": 0.1}, eval_strategy="steps", save_strategy="steps", interval=3
        ),
    ]


@pytest.fixture(autouse=True)
def one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in one way, whatever their rows: ways that are chosen by timing round differently, together and alone."""
    monkeypatch.setattr(linear, "way", lambda dtype, rows, transposed: torch.nn.functional.linear)


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


def same(a: str | Path, b: str | Path, tolerance: float = 1e-5) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for key, value in first.items():  # virtual tokens grow to 3: relative to that
        error = (value - second[key]).abs().max() / value.abs().max().clamp_min(1)
        assert error <= tolerance, (key, float(error))


def losses(folder: str | Path, key: str = "loss") -> list[float]:
    history = json.loads((Path(folder) / "metrics.json").read_text())["history"]
    return [e[key] for e in history if key in e]


def test_each_run_is_as_alone(tmp_path: Path) -> None:
    for one in crowd(tmp_path / "alone"):
        run(one, quiet=True)
    together = Together(quiet=True)
    for one in crowd(tmp_path / "together"):
        together.add(one)
    outcomes = together.run()
    assert [o.error for o in outcomes] == [None] * 6
    assert together.passes == {"joint": 5, "alone": 6 + 3}  # each run's first one, and the longest run's last ones
    for one in outcomes:
        name = Path(one.recipe.output_dir).name
        same(tmp_path / "alone" / name, one.recipe.output_dir)
        for key in ("loss", "eval_loss", "grad_norm"):
            mine, theirs = losses(one.recipe.output_dir, key), losses(tmp_path / "alone" / name, key)
            assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5), (name, key)


def test_an_early_stop_is_one_runs_own(tmp_path: Path) -> None:
    each = {"eval_strategy": "steps", "save_strategy": "steps", "interval": 1}

    def pair(folder: Path) -> list[Recipe]:
        """One whose loss grows at once, and one that goes on."""
        return [recipe(folder, "stops", learning_rate=3.0, early_stopping=1, **each), recipe(folder, "other")]

    for one in pair(tmp_path / "alone"):
        run(one, quiet=True)
    outcomes = train_together(pair(tmp_path / "together"), quiet=True)
    assert [o.error for o in outcomes] == [None, None]
    steps = {n: [len(losses(tmp_path / way / n)) for way in ("alone", "together")] for n in ("stops", "other")}
    assert steps["stops"][0] == steps["stops"][1] < 6
    assert steps["other"] == [6, 6]
    same(tmp_path / "alone" / "other", tmp_path / "together" / "other")


@pytest.mark.slow
def test_fifty_steps_stay_within_1e5(tmp_path: Path) -> None:
    def runs(folder: Path) -> list[Recipe]:
        return [
            recipe(folder, "lora", options={"r": 8}, max_steps=50),
            recipe(folder, "prompt", "prompt-tuning", max_steps=50),
            recipe(folder, "prefix", "prefix-tuning", max_steps=50),
        ]

    for one in runs(tmp_path / "alone"):
        run(one, quiet=True)
    for outcome in train_together(runs(tmp_path / "together"), quiet=True):
        same(tmp_path / "alone" / Path(outcome.recipe.output_dir).name, outcome.recipe.output_dir)


class Poison(TrainerCallback):
    """Makes an adapter's values NaN at a step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 2:
            with torch.no_grad():
                for p in model.parameters():
                    if p.requires_grad:
                        p.fill_(torch.nan)


class Bad(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            raise OSError("the data went away")


def test_runs_fail_alone(tmp_path: Path) -> None:
    run(recipe(tmp_path, "reference"), quiet=True)
    together = Together(quiet=True)
    ended: list[str] = []
    note = lambda outcome: ended.append(Path(outcome.recipe.output_dir).name)  # noqa: E731
    together.add(recipe(tmp_path, "nan", max_steps=20), callbacks=[Poison()], done=note)
    together.add(recipe(tmp_path, "good"), done=note)
    together.add(recipe(tmp_path, "bad"), callbacks=[Bad()], done=note)
    broken = recipe(tmp_path, "broken")
    together.add(broken.replace(method_options={"target_modules": ["nothing"]}), done=note)
    nan, good, bad, missing = together.run()
    assert isinstance(nan.error, DivergedError) and "at step 3" in str(nan.error) and "learning_rate" in str(nan.error)
    assert isinstance(bad.error, OSError) and isinstance(missing.error, graftlm.errors.TargetError)
    assert good.error is None and sorted(ended) == ["bad", "broken", "good", "nan"]
    same(tmp_path / "reference", tmp_path / "good")


def test_a_row_that_fails_the_joint_pass_fails_its_run_only(tmp_path: Path) -> None:
    run(recipe(tmp_path, "reference"), quiet=True)
    together = Together(quiet=True)

    class Spoil(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
            collate = train_dataloader.base_dataloader.collate_fn if hasattr(train_dataloader, "base_dataloader") else None
            inner = collate or train_dataloader.collate_fn

            def spoiled(rows: Any) -> Any:
                made = inner(rows)
                made["input_ids"] = made["input_ids"] + 10**6
                return made

            train_dataloader.__dict__.get("base_dataloader", train_dataloader).__dict__["collate_fn"] = spoiled

    together.add(recipe(tmp_path, "spoiled"), callbacks=[Spoil()])
    together.add(recipe(tmp_path, "good"))
    spoiled, good = together.run()
    assert isinstance(spoiled.error, IndexError)
    assert good.error is None
    same(tmp_path / "reference", tmp_path / "good")


def test_dropout_under_activation_checkpointing_takes_turns(tmp_path: Path) -> None:
    options = {"method_options": {"lora_dropout": 0.2}}
    runs = [recipe(tmp_path, n, gradient_checkpointing=True, seed=i).replace(**options) for i, n in enumerate("ab")]
    for one in runs:
        run(one.replace(output_dir=f"{one.output_dir}-alone"), quiet=True)
    together = Together(quiet=True)
    for one in runs:
        together.add(one)
    assert [o.error for o in together.run()] == [None, None] and together.passes["joint"] == 0
    for one in runs:
        same(f"{one.output_dir}-alone", one.output_dir)


class Breaks(TrainerCallback):
    """A gradient hook that raises at a step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 2:
            parameter = next(p for p in model.parameters() if p.requires_grad)
            parameter.register_hook(self.fail)

    @staticmethod
    def fail(gradient: torch.Tensor) -> None:
        raise RuntimeError("no more memory")


def test_a_backward_that_fails_is_one_runs_own(tmp_path: Path) -> None:
    run(recipe(tmp_path, "reference"), quiet=True)
    together = Together(quiet=True)
    together.add(recipe(tmp_path, "breaks", seed=4), callbacks=[Breaks()])
    together.add(recipe(tmp_path, "good"))
    breaks, good = together.run()
    assert "no more memory" in str(breaks.error) and good.error is None
    same(tmp_path / "reference", tmp_path / "good")


def test_each_seed_is_measured_on_its_own_rows(tmp_path: Path) -> None:
    rows = "\n".join(f"question {i},answer {i % 7}" for i in range(30))
    (tmp_path / "data.csv").write_text(f"prompt,completion\n{rows}\n")
    data = {"source": str(tmp_path / "data.csv"), "format": "completion", "holdout": 0.2}
    runs = [recipe(tmp_path, f"{s}", seed=s, max_steps=1).replace(data=data) for s in (0, 1)]
    before = [run(r.replace(output_dir=f"{r.output_dir}-alone"), quiet=True).metrics["loss_before"] for r in runs]
    outcomes = train_together(runs, quiet=True)
    assert [o.result.metrics["loss_before"] for o in outcomes] == pytest.approx(before, rel=1e-6)
    assert before[0] != before[1]


def test_late_runs_join_and_the_base_is_given_back(tmp_path: Path) -> None:
    base, tokenizer = resolve_base(PLACE["base"], dtype="fp32")
    before = {k: v.clone() for k, v in base.state_dict().items()}
    kinds = [type(m) for m in base.modules()]
    for one in (recipe(tmp_path, "alone", seed=5), recipe(tmp_path, "alone-prompt", "prompt-tuning")):
        run(one, model=base, tokenizer=tokenizer, quiet=True)
    together = Together(base, tokenizer, quiet=True, at_once=2)

    def follow(outcome: Any) -> None:
        together.add(recipe(tmp_path, "later", seed=5))

    together.add(recipe(tmp_path, "short", max_steps=2), done=follow)
    together.add(recipe(tmp_path, "long", max_steps=12))
    together.add(recipe(tmp_path, "waits", "prompt-tuning"))
    outcomes = together.run()
    assert [o.error for o in outcomes] == [None] * 4
    same(tmp_path / "alone", tmp_path / "later")
    same(tmp_path / "alone-prompt", tmp_path / "waits")
    assert [type(m) for m in base.modules()] == kinds
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())


def test_what_runs_must_share(tmp_path: Path) -> None:
    one = recipe(tmp_path, "one")
    with pytest.raises(RecipeError, match="output_dir.*two runs"):
        train_together([one, one])
    with pytest.raises(RecipeError, match="quantization: 'nf4' in the run of .*other.*share one base"):
        train_together([one, recipe(tmp_path, "other").replace(quantization="nf4")])
    with pytest.raises(RecipeError, match="gradient_checkpointing"):
        train_together([one, recipe(tmp_path, "other", gradient_checkpointing=True)])
    with pytest.raises(RecipeError, match="at_once=0"):
        train_together([one], at_once=0)
    assert train_together([]) == []


def test_interrupted_runs_go_on(tmp_path: Path) -> None:
    settings = {"save_strategy": "epoch", "max_steps": 8}
    for name, method in (("a", "lora"), ("b", "prompt-tuning")):
        run(recipe(tmp_path / "alone", name, method, **settings), quiet=True)

    class Interrupt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    together = Together(quiet=True)
    runs = [recipe(tmp_path / "cut", name, method, **settings) for name, method in (("a", "lora"), ("b", "prompt-tuning"))]
    together.add(runs[0], callbacks=[Interrupt()])
    together.add(runs[1])
    with pytest.raises(TrainingInterrupted, match="Every run that had begun has saved"):
        together.run()
    assert all(any(Path(one.output_dir).glob("checkpoint-*")) for one in runs)
    outcomes = train_together([one.replace(resume=True) for one in runs], quiet=True)
    assert [o.error for o in outcomes] == [None, None]
    for name in ("a", "b"):
        same(tmp_path / "alone" / name, tmp_path / "cut" / name)


def test_command_line(tmp_path: Path) -> None:
    paths = []
    for one in (recipe(tmp_path, "a", max_steps=2), recipe(tmp_path, "b", "prompt-tuning", max_steps=2)):
        paths.append(tmp_path / f"{Path(one.output_dir).name}.yaml")
        paths[-1].write_text(one.to_yaml())
    done = CliRunner().invoke(cli.app, ["train", *map(str, paths)])
    assert done.exit_code == 0, done.stderr
    assert "lora" in done.stdout and "prompt-tuning" in done.stdout
    assert all((tmp_path / n / "adapter_model.safetensors").is_file() for n in "ab")
    again = CliRunner().invoke(cli.app, ["train", *map(str, paths)])
    assert again.exit_code == 1 and "overwrite" in again.stderr + again.stdout


@pytest.mark.parametrize(("off", "joins"), [(9e-6, True), (5e-4, False)])
def test_small_losses_are_no_reason_to_take_turns(
    off: float, joins: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits round as they do at any loss: runs that have learnt join passes, too."""
    module = sys.modules[Together.__module__]
    real = module.joint_losses  # type: ignore[attr-defined]

    def learnt(shares: list[Any]) -> Any:
        if torch.is_grad_enabled():
            return real(shares)
        return [(torch.tensor(0.009 + off * (len(shares) > 1)), 1)] * len(shares)

    monkeypatch.setattr(module, "joint_losses", learnt)
    together = Together(quiet=True)
    for seed in (0, 1):
        together.add(recipe(tmp_path, f"{seed}", seed=seed, max_steps=2))
    assert [o.error for o in together.run()] == [None, None]
    assert bool(together.passes["joint"]) == joins
