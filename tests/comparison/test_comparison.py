"""The comparison: every method on one base, failures apart, files."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison_helpers import BROKEN, DATA, DIVERGING, SETTINGS
from transformers import AutoModelForCausalLM, AutoTokenizer

from graftlm import PeftModel
from graftlm.comparison import ComparisonResult, MethodRun, compare
from graftlm.comparison.table import errors, rich_table
from graftlm.errors import ConfigError, DataError, GraftError
from graftlm.training import Recipe, TrainingInterrupted

GOOD = ["lora:r=2", "prompt-tuning", "p-tuning", "prefix-tuning", "bottleneck"]


def small(base: str, folder: Path, *methods: str, **options: Any) -> ComparisonResult:
    """A comparison below `folder`."""
    made = {"base": base, "data": DATA, "methods": methods, "output_dir": folder / "o", "settings": SETTINGS, "quiet": True}
    return compare(**made | options)


def runs(result: ComparisonResult) -> dict[str, MethodRun]:
    return {r.label: r for r in result.runs}


def test_every_method_is_trained_and_measured(result):
    for label in GOOD:
        run = runs(result)[label]
        assert run.status == "done", run.error
        assert {"loss", "perplexity", "accuracy", "trainable_parameters", "file_bytes", "seconds"} <= set(run.metrics)
        assert run.metrics["loss_before"] == result.base_metrics["loss"]
        assert run.history and run.samples
    assert (result.train_rows, result.eval_rows) == (8, 6)
    assert result.quality == "accuracy" and result.best is not None


def test_a_failure_is_a_row_of_its_own(result):
    assert runs(result)[BROKEN].status == "failed"
    assert "r=-1" in runs(result)[BROKEN].error
    assert runs(result)[DIVERGING].status == "failed"
    assert "learning_rate" in runs(result)[DIVERGING].error


def test_adapters_load_and_give_the_measured_behaviour(result, base):
    for label in GOOD:
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), result.output_dir / runs(result)[label].directory
        )
        assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()


def test_recipes_repeat_the_runs(result, tmp_path):
    run = runs(result)["prompt-tuning"]
    path = tmp_path / "recipe.yaml"
    path.write_text(run.recipe)
    recipe = Recipe.from_yaml(path)
    assert recipe.method == "prompt-tuning" and recipe.method_options["num_virtual_tokens"] == 3
    assert recipe.training.learning_rate is not None
    from graftlm.training import run as train

    again = train(recipe.replace(output_dir=str(tmp_path / "again")), quiet=True)
    assert again.metrics["loss"] == pytest.approx(run.metrics["loss"], rel=1e-5)


def test_order_does_not_matter(result, base, tmp_path):
    """A method trained after the others on the shared base is the method trained alone."""
    alone = small(base, tmp_path, "bottleneck")
    assert alone.runs[0].metrics["loss"] == pytest.approx(runs(result)["bottleneck"].metrics["loss"], rel=1e-5)


def test_json_holds_it_all(result):
    values = json.loads(result.json_path.read_text())
    assert [r["label"] for r in values["runs"]] == [r.label for r in result.runs]
    assert "NaN" not in result.json_path.read_text()
    assert ComparisonResult.load(result.output_dir).to_dict() == result.to_dict()


def test_the_given_base_is_given_back(base, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    few = {"training": {"max_steps": 1}}
    small(base, tmp_path, "lora", "prefix-tuning", settings=few, model=model, tokenizer=tokenizer)
    after = model.state_dict()
    assert set(before) == set(after) and all(torch.equal(before[k], after[k]) for k in before)


def test_several_seeds(base, tmp_path):
    result = small(base, tmp_path, "lora", seeds=[0, 1])
    (row,) = result.rows
    assert [r.directory for r in row.runs] == ["lora-seed0", "lora-seed1"]
    assert row.deviation("loss") is not None
    assert "±" in result.report_path.read_text()


def test_ctrl_c_keeps_what_is_finished(base, tmp_path, monkeypatch):
    from graftlm import training

    real, calls = training.run, []

    def interrupted(recipe, **options):
        calls.append(recipe.method)
        if len(calls) == 2:
            raise TrainingInterrupted
        return real(recipe, **options)

    monkeypatch.setattr(training, "run", interrupted)
    result = small(base, tmp_path, "lora", "prompt-tuning", "bottleneck")
    assert [r.status for r in result.runs] == ["done", "interrupted", "not started"]
    assert result.interrupted and calls == ["lora", "prompt-tuning"]
    assert ComparisonResult.load(tmp_path / "o").runs[0].status == "done"


def test_a_run_that_leaves_something_in_the_base(base, tmp_path, monkeypatch):
    """The base is loaded anew for the next method."""
    from graftlm import training

    real, seen = training.run, []

    def messy(recipe, *, model, **options):
        seen.append(model)
        if len(seen) == 1:
            model.register_forward_hook(lambda *_: None)
            raise RuntimeError("died half-way")
        return real(recipe, model=model, **options)

    monkeypatch.setattr(training, "run", messy)
    result = small(base, tmp_path, "lora", "bottleneck")
    assert [r.status for r in result.runs] == ["failed", "done"]
    assert seen[0] is not seen[1]


def test_table_for_the_terminal(result):
    from rich.console import Console

    out = Console(file=io.StringIO(), width=100)
    out.print(rich_table(result))
    text = out.file.getvalue()
    for word in ("base (before)", "lora:r=2", "failed", "accuracy", "memory"):
        assert word in text
    assert len(errors(result)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["lroa"]}, "lora"),
        ({"methods": []}, "No methods"),
        ({"methods": ["lora", "lora"]}, "twice"),
        ({"methods": ["lora:r"]}, "OPTION=VALUE"),
        ({"methods": ["lora:data.source=quotes"]}, "same data"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "seeds"),
        ({"overrides": {"bottleneck": {}}}, "bottleneck"),
        ({"data": "twets"}, "tweets"),
        ({"base": "./nowhere", "model": None}, "nowhere"),
    ],
)
def test_mistakes_that_concern_all_methods(base, tmp_path, options, message):
    with pytest.raises(GraftError, match=message):
        compare(**{"base": base, "data": DATA, "methods": ["lora"], "output_dir": tmp_path / "o", "quiet": True} | options)


def test_nothing_is_overwritten_unasked(result, base, tmp_path):
    with pytest.raises(ConfigError, match="overwrite"):
        compare(base=base, data=DATA, methods=["lora"], output_dir=result.output_dir, quiet=True)
    (tmp_path / "precious").write_text("")
    with pytest.raises(ConfigError, match="not empty"):
        compare(base=base, data=DATA, methods=["lora"], output_dir=tmp_path, overwrite=True, quiet=True)


def test_bad_data_is_no_row(base, tmp_path):
    with pytest.raises(DataError):
        small(base, tmp_path, "lora", data={"source": "tweets", "format": "alpaca"})
