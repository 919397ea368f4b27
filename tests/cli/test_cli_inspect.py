"""`graftlm inspect`, on whole and on broken directories."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
from cli_helpers import rewrite, tiny_model
from safetensors.torch import load_file, save_file
from transformers import BloomForCausalLM

WEIGHTS = "adapter_model.safetensors"


def report(result, code: int = 0) -> dict:
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


@pytest.fixture
def copy(adapters, tmp_path) -> Path:
    """A LoRA adapter that may be damaged."""
    return Path(shutil.copytree(adapters["lora"], tmp_path / "copy"))


@pytest.mark.parametrize(("name", "method"), [("lora", "LORA"), ("prompt", "PROMPT_TUNING"), ("bottleneck", "BOTTLENECK")])
def test_facts_and_fit(cli, base, adapters, name, method):
    found = report(cli("inspect", adapters[name], "--base", base, "--json"))
    assert found["method"] == method
    assert found["fit"]["fits"] and not found["problems"]
    assert found["parameters"] == sum(t["bytes"] for t in found["tensors"]) // 4
    assert found["base_fingerprint"]["model_type"] == "bloom"


def test_for_people(cli, base, adapters):
    result = cli("inspect", adapters["ptuning"], "--base", base, "--tensors")
    assert result.exit_code == 0
    for text in ("P_TUNING", "prompt_embeddings", "training_state.safetensors", "fits", "encoder_hidden_size"):
        assert text in result.stdout


def test_directories_of_hf_peft(cli, base, tmp_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2)
    peft.get_peft_model(BloomForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path)
    found = report(cli("inspect", tmp_path, "--base", base, "--json"))
    assert found["fit"]["fits"] and found["base_fingerprint"] is None
    assert "HF PEFT" in found["notes"][0]


def test_other_shapes_are_all_listed(cli, adapters, tmp_path, base):
    other = shutil.copytree(base, tmp_path / "other")
    tiny_model(hidden=32).save_pretrained(other)
    fit = report(cli("inspect", adapters["lora"], "--base", other, "--json"), code=1)["fit"]
    assert not fit["fits"]
    assert len(fit["mismatched"]) == 4
    assert "another base" in fit["error"]


def test_missing_and_unexpected_keys(cli, copy, base):
    tensors = load_file(copy / WEIGHTS)
    gone = sorted(tensors)[0]
    tensors["base_model.model.nonsense.lora_A.weight"] = tensors.pop(gone)
    save_file(tensors, copy / WEIGHTS)
    fit = report(cli("inspect", copy, "--base", base, "--json"), code=1)["fit"]
    assert fit["missing"][0].startswith(gone) and "nonsense" in fit["unexpected"][0]
    shown = cli("inspect", copy, "--base", base)
    assert shown.exit_code == 1 and "missing keys (1)" in shown.stdout


def test_not_finite_values(cli, copy, base):
    tensors = load_file(copy / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, copy / WEIGHTS)
    fit = report(cli("inspect", copy, "--base", base, "--json"), code=1)["fit"]
    assert "NaN" in fit["error"]


def test_targets_that_the_base_has_not(cli, copy, base):
    rewrite(copy, target_modules=["q_proj"])
    fit = report(cli("inspect", copy, "--base", base, "--json"), code=1)["fit"]
    assert "cannot be attached" in fit["error"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / WEIGHTS).unlink(), "is missing"),
        (lambda f: (f / WEIGHTS).write_bytes(b"\0" * 20), "not a readable safetensors file"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-50]), "not a readable safetensors file"),
        (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), "pickle"),
        (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json is missing"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "adapter_config.json").write_text("[1]"), "expected an object"),
        (lambda f: rewrite(f, peft_type="LORE"), "LORE"),
        (lambda f: rewrite(f, r="many"), "r="),
    ],
)
def test_broken_directories(cli, copy, base, damage, message):
    damage(copy)
    found = report(cli("inspect", copy, "--json", "--base", base), code=1)
    assert any(message in p for p in found["problems"]), found["problems"]
    assert not found["fit"]["fits"]
    assert cli("inspect", copy).exit_code == 1


def test_several_adapters_in_a_folder(cli, adapters):
    found = report(cli("inspect", Path(adapters["lora"]).parent, "--json"))
    assert [f["method"] for f in found] == ["BOTTLENECK", "LORA", "PROMPT_TUNING", "P_TUNING"]


def test_no_adapter_there(cli, base, tmp_path):
    whole = cli("inspect", base)
    assert whole.exit_code == 2 and "whole model" in whole.stderr
    assert cli("inspect", tmp_path / "nowhere").exit_code == 2
    (tmp_path / "file").write_text("")
    assert "is a file" in cli("inspect", tmp_path / "file").stderr
