"""Rows over quantised bases in one comparison: each on its own form of the base, measured against it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from comparison_helpers import DATA, SETTINGS
from rich.console import Console
from test_report import check_self_contained
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM

from graftlm.comparison import ComparisonResult, compare
from graftlm.comparison.bases import Bases
from graftlm.comparison.table import rich_table
from graftlm.errors import ConfigError
from graftlm.training import Recipe

FORMS = {"lora:r=2": None, "lora-int8:r=2": "int8", "qlora:r=2": "nf4", "prompt-tuning:quantization=nf4": "nf4"}


@pytest.fixture(scope="module")
def mixed(base: str, tmp_path_factory: pytest.TempPathFactory) -> ComparisonResult:
    folder: Path = tmp_path_factory.mktemp("mixed") / "out"
    return compare(base=base, data=DATA, methods=list(FORMS), output_dir=folder, settings=SETTINGS, quiet=True)


def test_every_row_has_its_own_base(mixed):
    assert {r.label: r.quantization for r in mixed.runs} == FORMS
    assert list(mixed.bases) == ["base", "base in int8", "base in nf4"]
    of = {m["quantization"]: m for m in mixed.bases.values()}
    for run in mixed.runs:
        assert run.status == "done", run.error
        for key in ("loss", "accuracy"):
            assert run.metrics[f"{key}_before"] == of[run.quantization][key]
        assert run.metrics["base_bytes"] == of[run.quantization]["base_bytes"]
        assert run.metrics["loss"] < run.metrics["loss_before"]
    assert mixed.base_metrics["base_bytes"] > of["int8"]["base_bytes"] > of["nf4"]["base_bytes"]
    assert len({m["loss"] for m in of.values()}) == 3
    assert mixed.base_parameters == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(mixed.base).parameters())


def test_recipes_say_the_quantisation(mixed):
    recipes = [
        Recipe.from_dict(Recipe.from_yaml(mixed.output_dir / r.directory / "recipe.yaml").model_dump()) for r in mixed.runs
    ]
    assert [r.quantization for r in recipes] == list(FORMS.values())


def test_table_report_and_json_show_it(mixed):
    out = Console(file=io.StringIO(), width=100)
    out.print(rich_table(mixed))
    text = check_self_contained(mixed.report_path.read_text()).text
    for word in ("base in int8", "base in nf4", "qlora:r=2"):
        assert word in out.file.getvalue() and word in text
    assert "Base in memory" in text
    values = json.loads(mixed.json_path.read_text())
    assert set(values["quantized"]) == {"int8", "nf4"} and [r["quantization"] for r in values["runs"]] == list(
        FORMS.values()
    )
    assert ComparisonResult.load(mixed.output_dir).to_dict() == mixed.to_dict()


def test_the_table_fits_a_terminal(mixed):
    out = Console(file=io.StringIO(), width=80)
    out.print(rich_table(mixed))
    assert "memory" in out.file.getvalue() and " MB" in out.file.getvalue()


def test_bases_are_let_go(base, tmp_path, monkeypatch):
    held, real = [], Bases.keep

    def keep(self, schemes):
        real(self, schemes)
        held.append(set(self.held))

    monkeypatch.setattr(Bases, "keep", keep)
    few = {"training": {"max_steps": 1}}
    methods = ["lora:r=2", "qlora:r=2", "lora-int8:r=2", "qlora:r=3"]
    result = compare(base=base, data=DATA, methods=methods, output_dir=tmp_path / "o", settings=few, quiet=True)
    assert [r.status for r in result.runs] == ["done"] * 4
    assert held == [set(), set(), set()]  # three forms, one at a time


def test_only_quantised_rows(base, tmp_path):
    few = {"training": {"max_steps": 1}, "quantization": "nf4"}
    result = compare(base=base, data=DATA, methods=["lora:r=2"], output_dir=tmp_path / "o", settings=few, quiet=True)
    assert list(result.bases) == ["base in nf4"] and not result.quantized and result.runs[0].quantization == "nf4"


# -- a base that is given ----------------------------------------------------------------------------------------------
def given(base: str, folder: Path, name: str, **options) -> ComparisonResult:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    made = {"data": DATA, "methods": ["lora:r=2", "qlora:r=2"], "settings": {"training": {"max_steps": 1}}, "quiet": True}
    return compare(base=name, output_dir=folder / "o", model=model, tokenizer=tokenizer, **made | options)


def test_a_given_base_is_loaded_by_its_name_for_a_quantised_row(base, tmp_path):
    result = given(base, tmp_path, base)
    assert [(r.status, r.quantization) for r in result.runs] == [("done", None), ("done", "nf4")]


def test_where_the_name_leads_nowhere(base, tmp_path):
    result = given(base, tmp_path, "./nowhere")
    assert [r.status for r in result.runs] == ["done", "failed"]
    assert "needs the base in nf4, which is done by its name" in result.runs[1].error and "nowhere" in result.runs[1].error


def test_where_the_name_is_another_base(base, tmp_path):
    other = BloomForCausalLM(BloomConfig(vocab_size=16384, hidden_size=16, n_layer=2, n_head=2))
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "other")
    result = given(base, tmp_path, str(tmp_path / "other"))
    assert [r.status for r in result.runs] == ["done", "failed"]
    assert "is not the base that was given" in result.runs[1].error


def test_unknown_schemes(base, tmp_path):
    options = {"base": base, "data": DATA, "output_dir": tmp_path / "o", "settings": SETTINGS, "quiet": True}
    with pytest.raises(ConfigError, match="did you mean 'nf4'"):
        compare(methods=["lora:quantization=nf5"], **options)
    result = compare(methods=["lora:quantization=nf5", "bottleneck"], **options)
    assert [r.status for r in result.runs] == ["failed", "done"] and "did you mean 'nf4'" in result.runs[0].error
