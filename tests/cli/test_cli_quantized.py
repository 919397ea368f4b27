"""`--quantization`: every command that loads a base, with notices apart from results."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from graftlm import LoraConfig, get_peft_model
from graftlm.quantization import loading_options

FEW = ["--steps", "1", "--set", "data.max_examples=4", "--set", "data.max_eval_examples=4", "--quiet"]


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory) -> str:
    """A LoRA that was trained over NF4."""
    folder = tmp_path_factory.mktemp("trained")
    model = AutoModelForCausalLM.from_pretrained(base, **loading_options("nf4", torch.bfloat16, "cpu"))
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory) -> str:
    """A base that was saved in int8."""
    folder = tmp_path_factory.mktemp("saved")
    AutoModelForCausalLM.from_pretrained(base, **loading_options("int8", torch.bfloat16, "cpu")).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("scheme", ["int8", "nf4", "none"])
def test_generate(cli, base, trained, scheme):
    options = ["-b", base, "-a", trained, "--quantization", scheme, "--max-new-tokens", "2", "--json"]
    result = cli("generate", "Hello", *options)
    assert result.exit_code == 0, result.output
    assert list(json.loads(result.stdout)) == ["prompt", "answers"]
    assert ("in another form (nf4)" in result.stderr) is (scheme != "nf4")


def test_chat(cli, base, trained):
    result = cli("chat", "-b", base, "-a", trained, "--quantization", "nf4", "--max-new-tokens", "2", stdin="Hi\n")
    assert result.exit_code == 0, result.output


def test_evaluate(cli, base, trained):
    options = ["--base", base, "--data", "tweets", "--max-examples", "2", "--adapter", trained, "--json"]
    rows = {}
    for scheme in ("none", "nf4"):
        result = cli("evaluate", *options, "--quantization", scheme)
        assert result.exit_code == 0, result.output
        rows[scheme] = json.loads(result.stdout)
    assert rows["nf4"]["base"]["loss"] != rows["none"]["base"]["loss"]
    assert rows["nf4"]["base"]["loss"] == pytest.approx(rows["none"]["base"]["loss"], rel=0.05)


@pytest.mark.parametrize("words", [["--method", "qlora"], ["--quantization", "NF4"]])
def test_train(cli, base, tmp_path, words):
    result = cli("train", *words, "--base", base, "--output", tmp_path / "out", *FEW, "--set", "dtype=bf16")
    assert result.exit_code == 0, result.output
    assert "lora over nf4 on tweets" in result.stdout and "prepare_model" not in result.stdout
    assert "quantization: nf4" in (tmp_path / "out" / "recipe.yaml").read_text()
    found = json.loads(cli("inspect", tmp_path / "out", "--json").stdout)
    assert found["base_fingerprint"]["form"] == "nf4"


def test_compare(cli, base, tmp_path):
    methods = ["-m", "lora:r=2", "-m", "qlora:r=2"]
    result = cli("compare", "-b", base, *methods, "-o", tmp_path / "out", "--max-steps", "1", *FEW[2:])
    assert result.exit_code == 0, result.output
    assert "base (before)" in result.stdout and "base in nf4" in result.stdout


def test_inspect_shows_the_form(cli, base, trained, saved):
    result = cli("inspect", trained, "--base", base)
    assert result.exit_code == 0, result.output
    assert "bloom in nf4" in result.stdout
    text = " ".join(result.stdout.split())
    assert "trained over nf4, this one is unquantised: outputs differ slightly" in text
    other = json.loads(cli("inspect", trained, "--base", saved, "--json").stdout)
    assert other["fit"]["fits"] and "this one is int8" in other["fit"]["detail"]
    whole = cli("inspect", saved)
    assert whole.exit_code == 2 and "a whole model in int8" in whole.stderr


def test_a_base_that_was_saved_quantised(cli, saved, trained, tmp_path):
    assert cli("generate", "Hello", "-b", saved, "--max-new-tokens", "2").exit_code == 0
    other = cli("generate", "Hello", "-b", saved, "--quantization", "nf4")
    assert other.exit_code == 2 and "is saved in int8, and quantization='nf4' was asked for" in other.stderr
    merged = cli("merge", "-b", saved, "-a", trained, "-o", tmp_path / "merged")
    assert merged.exit_code == 2 and "is saved in int8" in merged.stderr and "--base" in merged.stderr


def test_merging_into_the_unquantised_base(cli, base, trained, tmp_path):
    result = cli("merge", "-b", base, "-a", trained, "-o", tmp_path / "merged")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "x", "--quantization", "int4"], "did you mean 'int8' or 'nf4'"),
        (["evaluate", "--quantization", "nf5"], "did you mean 'nf4'"),
        (["train", "--quantization", "nf5"], "did you mean 'nf4'"),
        (["train", "--method", "qlora", "--quantization", "int8"], "leave one out"),
        (["train", "--set", "dtype=fp16", "--steps", "1"], "needs a GPU"),
        (["compare", "-m", "qloraa"], "did you mean 'qlora'"),
    ],
)
def test_bad_input(cli, base, tmp_path, arguments, message):
    output = {"train": ["--output", tmp_path / "out"], "compare": ["-o", tmp_path / "out"]}.get(arguments[0], [])
    result = cli(*arguments, "--base", base, *output)
    assert result.exit_code == 2, result.output
    assert message in result.stderr


def test_without_bitsandbytes(cli, base, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    result = cli("generate", "x", "-b", base, "--quantization", "nf4")
    assert result.exit_code == 2 and "pip install bitsandbytes" in result.stderr
