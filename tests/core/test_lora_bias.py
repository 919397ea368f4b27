"""LoRA with `lora_bias`, and the orthogonal start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import batch
from helpers import close, fresh, logits_of, randomise, state_of
from lora_helpers import OPTIONS, twenty
from test_parity import both_ways

import graftlm
from graftlm.errors import ConfigError, UnsupportedError


def wrapped(name: str, **options: Any) -> graftlm.PeftModel:
    return randomise(graftlm.get_peft_model(fresh(name), graftlm.LoraConfig(**{**OPTIONS, **options}))).eval()


# -- lora_bias ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["bloom", "gpt2"])
def test_files_both_ways(name: str, tmp_path: Path) -> None:
    both_ways(lambda: fresh(name), lambda lib: lib.LoraConfig(**OPTIONS, lora_bias=True), batch(name), tmp_path)


@pytest.mark.parametrize("init", [True, False])
def test_twenty_losses(init: bool) -> None:
    twenty("bloom", lambda lib: lib.LoraConfig(**OPTIONS, lora_bias=True, init_lora_weights=init))


def test_starts() -> None:
    for init in (True, False):
        model = graftlm.get_peft_model(fresh("bloom"), graftlm.LoraConfig(**OPTIONS, lora_bias=True, init_lora_weights=init))
        biases = [p for key, p in model.adapter_parameters("default") if key.endswith("lora_B.default.bias")]
        assert biases
        assert all(bool(b.any()) is not init for b in biases)


def test_merged_mixed_and_composed() -> None:
    model = wrapped("bloom", lora_bias=True)
    for other, options in (
        ("scaled", graftlm.IA3Config(task_type="CAUSAL_LM")),
        ("dora", graftlm.LoraConfig(**OPTIONS, use_dora=True)),
    ):
        model.add_adapter(other, options)
        model.set_adapter(other)
        randomise(model, scale=0.3)
    inputs = batch("bloom", rows=4)
    inputs.pop("labels")
    rows = ["default", "__base__", ["default", "scaled"], ["default", "dora"]]
    mixed = logits_of(model, **inputs, adapter_names=rows)
    for i, row in enumerate(rows):
        own = {k: v[i : i + 1] for k, v in inputs.items()}
        close(mixed[i], logits_of(model, **own, adapter_names=[row])[0], 2e-5)
    for names in (["default"], ["default", "scaled"], ["default", "dora"], ["scaled", "default"]):
        model.set_adapter(names)
        wanted, before = logits_of(model, **inputs), state_of(model)
        model.merge_adapter()
        close(logits_of(model, **inputs), wanted, 5e-5)
        with model.disable_adapter():
            assert torch.equal(logits_of(model, **inputs), logits_of(fresh("bloom"), **inputs))
        model.unmerge_adapter()
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    close(logits_of(model.merge_and_unload(), **inputs), wanted, 5e-5)


def test_without_a_bias_to_merge_into() -> None:
    with pytest.warns(
        UserWarning, match=r"'model.layers.0.self_attn.q_proj' \(and 13 more\) has no bias, so .* cannot be merged"
    ):
        model = wrapped("llama", lora_bias=True)
    before = state_of(model)
    with pytest.raises(UnsupportedError, match="has no bias that it could be merged into. Keep it attached"):
        model.merge_adapter()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_what_does_not_go_with_it() -> None:
    for options in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(ConfigError, match=f"lora_bias=True does not go with {next(iter(options))}"):
            graftlm.LoraConfig(lora_bias=True, **options)
    with pytest.raises(ConfigError, match="lora_bias=True is not supported for Embedding"):
        wrapped("bloom", target_modules=["word_embeddings"], lora_bias=True)


# -- orthogonal --------------------------------------------------------------------------------------------------------
def test_orthogonal(tmp_path: Path) -> None:
    def settings(lib: Any) -> Any:
        return lib.LoraConfig(**OPTIONS, init_lora_weights="orthogonal")

    both_ways(lambda: fresh("llama"), settings, batch("llama"), tmp_path)
    twenty("llama", settings)
    model = graftlm.get_peft_model(fresh("llama"), settings(graftlm)).eval()
    layer = model.base.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.any()
    assert b.any()
    close(b @ a, torch.zeros(32, 32), 1e-7)
    close(logits_of(model, **batch("llama")), logits_of(fresh("llama"), **batch("llama")))


def test_orthogonal_needs_halves() -> None:
    with pytest.raises(ConfigError, match="'orthogonal' needs an even rank, got r=3"):
        wrapped("llama", r=3, init_lora_weights="orthogonal")
