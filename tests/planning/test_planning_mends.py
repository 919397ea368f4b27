"""Changes that make a run fit, the plan's line before a run, and what is said when memory runs out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from planning_helpers import KNOWN

import graftlm
from graftlm.errors import ExhaustedError, PlanError
from graftlm.planning import mends, step, watching
from graftlm.training import Recipe, defaults

GIVEN: dict[str, Any] = {"rows": 40, "length": 200}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that was measured before."""
    monkeypatch.setattr("graftlm.planning.whole.machine", lambda form, say=None: KNOWN)
    monkeypatch.setattr(watching, "known", lambda form: KNOWN)


def test_the_cheapest_change_that_fits_comes_last_and_fits() -> None:
    recipe = Recipe.from_dict({"training": {"batch_size": 4}})
    whole = graftlm.plan(recipe, **GIVEN)
    settings = GIVEN | {"device": f"{whole.peak_bytes - (20 << 20)}"}
    small = graftlm.plan(recipe, **settings)
    assert not small.fits
    found = mends.mends(recipe, small, settings)
    chosen = mends.fitting(found)
    assert chosen is found[-1] and not any(m.plan.fits for m in found[:-1])
    again = graftlm.plan(recipe.replace(*chosen.overrides), **settings)
    assert again.fits and again.peak_bytes == chosen.plan.peak_bytes < small.peak_bytes
    t = again.recipe.training
    if not t.packing:  # as many rows an update as before
        assert t.batch_size is not None and t.batch_size * t.accumulation == 4


def test_where_nothing_fits() -> None:
    with pytest.raises(PlanError, match="smaller base"):
        mends.fitting([])


def test_changes_in_order() -> None:
    recipe = Recipe.from_dict({"method_options": {"r": 8}, "training": {"batch_size": 2}, "dtype": "fp32"})
    whats = [what for what, _ in mends.changes(graftlm.plan(recipe, **GIVEN))]
    wanted = ["1 rows", "packing", "fewer rows", "activation checkpointing every", "activation checkpointing", "bf16",
              "int8", "NF4", "rank 4", "rows of at most 100"]  # fmt: skip
    places = [next(i for i, what in enumerate(whats) if word in what) for word in wanted]
    assert places == sorted(places)


# -- the line before a run ------------------------------------------------------------------------------------------------
def told(recipe: Recipe, **options: Any) -> tuple[list[str], Any, Any]:
    lines: list[str] = []
    return lines, *watching.ahead([recipe], lines.append, **options)


def test_a_line_before(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.from_dict({"data": {"max_examples": 12}, "training": {"batch_size": 2}})
    assert told(recipe) == ([], None, None)  # a base so small that its run is as short as its plan
    monkeypatch.setattr(watching, "SMALL", 0)
    monkeypatch.setattr(watching, "known", lambda form: None)
    lines, planned, data = told(recipe)
    assert lines[0].startswith(planned.line()) and planned.evaluation_bytes > 0
    assert "figures are assumed" in lines[0]
    assert len(data.train_rows) == planned.rows["rows"] == 12


@pytest.mark.parametrize("error", [RuntimeError("broken"), PlanError("no such form")])
def test_planning_keeps_no_run_from_being_made(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise error

    monkeypatch.setattr(watching, "SMALL", 0)
    monkeypatch.setattr(watching, "single", broken)
    lines, planned, _ = told(Recipe.from_dict({"data": {"max_examples": 12}}))
    assert planned is None and "not planned" in lines[0] and str(error) in lines[0]


def test_a_run_in_a_machine_that_was_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "known", lambda form: None)
    found = watching.measured_or_assumed("fp32")
    assert found.process_bytes > found.start_bytes > 0


# -- memory runs out ------------------------------------------------------------------------------------------------------
def exhaust() -> None:
    torch.empty(2**55)


def raised(error: Exception) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize(
    "action",
    [exhaust, raised(MemoryError()), raised(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))],
)
def test_a_lack_of_memory_says_plan_actual_and_mend(action: Callable[[], None]) -> None:
    planned = graftlm.plan(Recipe.from_dict({"training": {"batch_size": 4}}), **GIVEN)
    with pytest.raises(ExhaustedError, match="ran out") as caught, watching.memory_watched(planned, "there"):
        action()
    text = str(caught.value)
    for word in (
        "Planned were",
        "had taken at most",
        "training.batch_size=2 training.accumulation=2",
        "there stays",
        "--resume",
    ):
        assert word in text
    with pytest.raises(ExhaustedError, match="not planned"), watching.memory_watched(None, "there"):
        action()


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes") as caught, watching.memory_watched(None, "there"):
        raise RuntimeError("shapes do not match")
    assert not isinstance(caught.value, ExhaustedError)


def test_train_without_memory_keeps_what_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # the command, whose second checkpoint finds no memory
    from typer.testing import CliRunner

    from graftlm.cli import app
    from graftlm.training import trainer

    monkeypatch.setattr(watching, "SMALL", 0)
    step, done = trainer.Trainer.training_step, []

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        done.append(1)
        if len(done) == 3:
            exhaust()
        return step(self, *args, **kwargs)

    monkeypatch.setattr(trainer.Trainer, "training_step", failing)
    sets = ["data.max_examples=8", "data.holdout=0", "data.source=quotes", "training.batch_size=2",
            "training.save_strategy=steps", "training.interval=1", "training.eval_strategy=no",
            "training.load_best=false"]  # fmt: skip
    words = ["train", "--steps", "4", "-o", str(tmp_path / "out"), *(w for s in sets for w in ("--set", s))]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and "memory ran out" in result.stderr and "Planned were" in result.stderr
    assert result.stderr.startswith("Plan: ") or "\nPlan: " in result.stderr
    assert any((tmp_path / "out").glob("checkpoint-*"))


def test_compare_without_memory_says_what_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row fails alone; another one's adapter stays."""
    from typer.testing import CliRunner

    from graftlm.cli import app
    from graftlm.training import trainer

    monkeypatch.setattr(watching, "SMALL", 0)
    step = trainer.Trainer.training_step

    def failing(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if "lora" in str(self.args.output_dir):
            exhaust()
        return step(self, model, *args, **kwargs)

    monkeypatch.setattr(trainer.Trainer, "training_step", failing)
    sets = ["data.max_examples=8", "data.max_eval_examples=4", "training.batch_size=2", "training.eval_strategy=no"]
    words = ["compare", "-d", "quotes", "-m", "lora", "-m", "ia3", "--max-steps", "1", "--general", "none",
             "-o", str(tmp_path / "out"), *(w for s in sets for w in ("--set", s))]  # fmt: skip
    result = CliRunner().invoke(app, words)
    assert "Plan: " in result.stderr, result.stderr
    rows = {r["label"]: r for r in json.loads((tmp_path / "out" / "comparison.json").read_text())["runs"]}
    for word in ("memory ran out", "Planned were", "had taken at most", "--at-once", "training.batch_size=1"):
        assert word in rows["lora"]["error"]
    assert rows["ia3"]["status"] == "done" and any((tmp_path / "out" / "ia3").glob("adapter_model*"))


def test_packing_is_proposed_only_where_it_holds() -> None:
    """A base that gives other results for packed rows is not told to pack them, nor planned with packed rows."""
    recipe = Recipe.from_dict({"training": {"batch_size": 4}})
    tried = mends.tried(recipe, "packing", ("training.packing=true", "training.tokens=200"), GIVEN)
    assert tried is not None
    forms = step.short_cuts

    def padded(*args: Any) -> Any:
        return dataclasses.replace(forms(*args), packs=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graftlm.planning.whole.short_cuts", padded)
        assert mends.tried(recipe, "packing", ("training.packing=true", "training.tokens=200"), GIVEN) is None
        with pytest.raises(PlanError, match="other results for packed rows"):
            graftlm.plan(recipe.replace("training.packing=true", "training.tokens=200"), **GIVEN)


def test_apply_writes_a_recipe_that_fits(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from graftlm.cli import app

    whole = graftlm.plan(Recipe.from_dict({"training": {"batch_size": 4}}), **GIVEN)
    device, file = str(whole.peak_bytes - (20 << 20)), tmp_path / "changed.yaml"
    words = ["plan", "--set", "training.batch_size=4", "--rows", "40", "--length", "200", "--device", device]
    result = CliRunner().invoke(app, [*words, "--apply", str(file)])
    assert result.exit_code == 0, result.stderr
    assert "does not fit" in result.stdout.lower() and "--set" in result.stdout
    assert graftlm.plan(str(file), device=device, **GIVEN).fits
    again = CliRunner().invoke(app, [*words, "--apply", str(file)])
    assert again.exit_code == 2 and "already" in again.stderr


def invoked(*words: str) -> Any:
    from typer.testing import CliRunner

    from graftlm.cli import app

    return CliRunner().invoke(app, ["plan", "--rows", "40", "--length", "200", *words], env={"COLUMNS": "160"})


def test_the_largest_batch_fits_and_a_larger_one_does_not() -> None:
    recipe = Recipe.from_dict({"training": {"batch_size": 5}})
    device = str(graftlm.plan(recipe, **GIVEN).peak_bytes + 1000)
    result = invoked("--largest", "batch_size", "--device", device, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)["largest"]
    assert found["value"] == 5 and found["plan"]["fits"]
    assert not graftlm.plan(recipe.replace("training.batch_size=6"), device=device, **GIVEN).fits
    assert invoked("--largest", "rank").exit_code == 2
    none = invoked("--largest", "batch_size", "--device", "100MiB")
    assert none.exit_code == 2 and "batch_size=1 does not fit" in none.stderr


def test_methods_side_by_side_as_table_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = {n: k for n, k in defaults.method_names().items() if n in ("lora", "ia3", "prompt-tuning")}
    monkeypatch.setattr(defaults, "method_names", lambda: some)
    picture = tmp_path / "p.svg"
    result = invoked("--compare", "--picture", str(picture))
    assert result.exit_code == 0, result.stderr
    order = [line.split()[1] for line in result.stdout.splitlines() if "yes" in line]
    assert sorted(order) == ["ia3", "lora", "prompt-tuning"] and "Planned, not measured" in result.stdout
    peaks = {m: graftlm.plan(Recipe.from_dict({"method": m}), **GIVEN).peak_bytes for m in order}
    assert order == sorted(order, key=peaks.__getitem__)
    drawn = picture.read_text(encoding="utf-8")
    assert "Planned, not measured" in drawn and all(method in drawn for method in order)
    assert invoked("--picture", str(picture)).exit_code == 2


def test_a_base_that_is_not_here_is_said_to_be() -> None:
    result = invoked("--set", "base=no-such-owner/no-such-base")
    assert result.exit_code == 2 and "no network" in result.stderr
    assert invoked("--device", "tpu").exit_code == 2
    assert invoked("--rows", "-5").exit_code == 2
