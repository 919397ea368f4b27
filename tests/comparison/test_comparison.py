"""The comparison: every method on one base, failures apart, files."""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison_helpers import BROKEN, DATA, DIVERGING, SETTINGS
from transformers import AutoModelForCausalLM, AutoTokenizer

from graftlm import PeftModel
from graftlm.comparison import ComparisonResult, MethodRun, compare
from graftlm.comparison.bases import Bases
from graftlm.comparison.table import errors, rich_table
from graftlm.errors import ConfigError, DataError, GraftError
from graftlm.training import Recipe

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
    from graftlm.training import together

    real, calls = together.run, []

    def interrupted(recipe, **options):
        calls.append(recipe.method)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(recipe, **options)

    monkeypatch.setattr(together, "run", interrupted)
    result = small(base, tmp_path, "lora", "prompt-tuning", "bottleneck", at_once=1)
    assert [r.status for r in result.runs] == ["done", "interrupted", "not started"]
    assert result.interrupted and calls == ["lora", "prompt-tuning"]
    assert ComparisonResult.load(tmp_path / "o").runs[0].status == "done"


def test_a_base_in_which_something_was_left_is_loaded_anew(base):
    bases = Bases(base, "fp32")
    first = bases.get(None)
    bases.renew(None)
    assert bases.get(None) is first
    first.model.register_forward_hook(lambda *_: None)
    bases.renew(None)
    assert bases.get(None) is not first


def test_together_is_as_alone(base, tmp_path):
    """The very same rows, one at a time and all at once."""
    methods = ("lora", "prompt-tuning", "prefix-tuning", "bottleneck")
    alone, joint = (small(base, tmp_path / str(n), *methods, at_once=n) for n in (1, 4))
    for a, b in zip(alone.runs, joint.runs, strict=True):
        assert a.metrics["loss"] == pytest.approx(b.metrics["loss"], rel=1e-4)
        assert a.metrics["general_loss"] == pytest.approx(b.metrics["general_loss"], rel=1e-4)
        assert a.metrics["seconds"] > 0 and b.metrics["peak_memory_bytes"] > 0


def test_a_grid(base, tmp_path):
    result = small(base, tmp_path, "lora:r=2|4,training.learning_rate=1e-3|1e-2")
    assert [r.label for r in result.runs] == [
        f"lora:r={r},training.learning_rate={rate}" for r in (2, 4) for rate in ("1e-3", "1e-2")
    ]
    assert all(r.status == "done" for r in result.runs) and len({r.metrics["loss"] for r in result.runs}) == 4


def test_forgetting_is_that_of_the_saved_adapter(result, base):
    from graftlm import PeftModel
    from graftlm.comparison.general import General
    from graftlm.training import resolve_base

    general = General.of("quotes", "tweets")
    model, tokenizer = resolve_base(base)
    before = general.measure(model, tokenizer)["general_loss"]
    for run in result.runs:
        if run.status != "done":
            continue
        assert run.metrics["general_loss_before"] == pytest.approx(before, rel=1e-5)
        adapted = PeftModel.from_pretrained(resolve_base(base)[0], result.output_dir / run.directory)
        assert general.measure(adapted, tokenizer)["general_loss"] == pytest.approx(run.metrics["general_loss"], rel=1e-4)


def test_learning_rates_are_searched_without_the_held_out_rows(base, tmp_path, monkeypatch):
    module, evaluation = (importlib.import_module(f"graftlm.{n}") for n in ("training.search", "training.evaluation"))
    seen, real = [], evaluation.loss_metrics

    def noted(model, tokenizer, rows, *rest):
        seen.append([tuple(r["input_ids"]) for r in rows])
        return real(model, tokenizer, rows, *rest)

    monkeypatch.setattr(module, "loss_metrics", noted)
    monkeypatch.setattr(module, "FACTORS", (0.1, 1.0, 1e6))
    data = {"source": "tweets", "max_examples": 20, "max_eval_examples": 6}
    methods = ["lora", "prompt-tuning:training.learning_rate=0.2"]
    result = compare(
        base=base,
        data=data,
        methods=methods,
        output_dir=tmp_path / "o",
        settings=SETTINGS,
        quiet=True,
        budget=3,
        general=None,
    )
    assert set(result.search) == {"lora"}
    trials = result.search["lora"]
    assert [t["status"] for t in trials].count("chosen") == 1 and len(trials) == 3
    chosen = next(t for t in trials if t["status"] == "chosen")
    recipe = Recipe.from_yaml(result.output_dir / "lora" / "recipe.yaml")
    assert recipe.training.learning_rate == pytest.approx(chosen["learning_rate"])
    held_out = {tuple(i) for i in loaded(result, recipe).held_out_rows["input_ids"]}
    tuned = [rows for rows in seen if not held_out & set(rows)]
    assert tuned and all(set(rows) <= {tuple(i) for i in loaded(result, recipe).train_rows["input_ids"]} for rows in tuned)
    assert "How the learning rates were found" in result.report_path.read_text()
    assert ComparisonResult.load(result.output_dir).search == json.loads(result.json_path.read_text())["search"]


def loaded(result, recipe):
    from graftlm.training import resolve_base
    from graftlm.training.setup import load_data_of

    return load_data_of(recipe, resolve_base(result.base)[1], False)


def test_the_worse_half_stops():
    from graftlm.training.search import Method

    method = Method([1e-3, 3e-3, 1e-2, 3e-2, 1e-1], [1.0, 2.0, 3.0], None, None)
    for candidate, loss in zip(method.candidates, (5.0, 3.0, 1.0, 2.0), strict=False):
        candidate.losses.append(loss)
        method.decide(0)
    assert all(c.status == "running" for c in method.candidates)  # one has not been measured
    method.candidates[4].status = "failed"
    method.decide(0)
    assert [c.status for c in method.candidates] == ["dropped", "dropped", "running", "running", "failed"]
    for candidate, loss in ((method.candidates[2], 0.9), (method.candidates[3], 0.5)):
        candidate.losses.append(loss)
        method.decide(1)
    assert [c.status for c in method.candidates][2:4] == ["dropped", "running"]
    assert method.chosen() is method.candidates[3]


def test_a_rate_that_fails_keeps_no_others_waiting():
    """The others were measured and wait for its measure; its failure decides."""
    from graftlm.training import Outcome, Recipe
    from graftlm.training.search import Method, Noted

    method = Method([1e-3, 3e-3, 1e-2, 3e-2, 1e-1], [1.0, 2.0, 3.0], None, None)
    for candidate, loss in zip(method.candidates, (5.0, 3.0, 1.0, 2.0), strict=False):
        candidate.losses.append(loss)
        method.decide(0)
    Noted(method, method.candidates[4])(Outcome(Recipe()))  # one that ended well decides nothing
    assert all(c.status == "running" for c in method.candidates)
    Noted(method, method.candidates[4])(Outcome(Recipe(), error=RuntimeError("diverged")))
    assert [c.status for c in method.candidates] == ["dropped", "dropped", "running", "running", "failed"]


@pytest.mark.parametrize(("budget", "message"), [(0, "budget=0"), (-1, "budget=-1")])
def test_bad_budgets(base, tmp_path, budget, message):
    with pytest.raises(ConfigError, match=message):
        small(base, tmp_path, "lora", budget=budget)


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
