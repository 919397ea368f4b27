"""Adapters as LoRA: exact where the rank suffices, the best of its rank elsewhere; HF PEFT reads what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import batch
from helpers import attach, close, config, fresh, logits_of, randomise, state_of
from test_parity import from_theirs, theirs

import graftlm
from graftlm import LoraConfig, convert_to_lora, save_as_lora
from graftlm.errors import AdapterError, ConfigError, UnsupportedError

INPUTS = batch("llama")
CONVERTED = (
    "loha",
    "lokr",
    "vera",
    "randlora",
    "fourierft",
    "ia3",
    "dora",
    "lora",
    "patterns",
    "embedding",
    "modules_to_save",
)


@pytest.mark.parametrize("method", CONVERTED)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_all_of_the_energy_is_the_adapter_itself(name: str, method: str, tmp_path: Path) -> None:
    """At share 1 the logits are the adapter's, read back here and in HF PEFT; the wrapper stays as it was."""
    if (name, method) == ("gpt2", "ia3"):
        pytest.skip("GPT-2's layers have biases, which (IA)3 scales")
    model, inputs = attach(name, method), batch(name)
    wanted, before = logits_of(model, **inputs), state_of(model)
    save_as_lora(tmp_path, model, 1.0)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert list(model.methods) == ["default"]
    again = graftlm.PeftModel.from_pretrained(fresh(name), tmp_path)
    assert isinstance(again.peft_config["default"], LoraConfig)
    close(logits_of(again, **inputs), wanted, 2e-5)
    close(logits_of(from_theirs(fresh(name), tmp_path), **inputs), wanted, 2e-5)


@pytest.mark.parametrize("rank", [3, 0.6])
def test_as_hf_peft_converts(rank: float) -> None:
    """The same products and ranks as HF PEFT's function."""
    settings = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"], "r": 6}
    mine = randomise(graftlm.get_peft_model(fresh("llama"), graftlm.LoKrConfig(**settings)), scale=0.3)
    their = theirs(fresh("llama"), peft.LoKrConfig(**settings))
    peft.set_peft_model_state_dict(their, graftlm.get_peft_model_state_dict(mine))
    own, state = convert_to_lora(mine, rank)
    other, wanted = peft.convert_to_lora(their, rank)
    assert state.keys() == wanted.keys()
    assert (own.r, own.lora_alpha) == (other.r, other.lora_alpha)
    assert own.rank_pattern == other.rank_pattern == own.alpha_pattern
    for key in state:
        if "lora_A" in key:
            pair = key, key.replace("lora_A", "lora_B")
            assert state[key].shape == wanted[key].shape
            close(*(made[pair[1]] @ made[pair[0]] for made in (state, wanted)))  # type: ignore[call-arg]


def test_error_that_is_printed_and_ranks(capsys: Any) -> None:
    model = attach("llama", "loha")
    errors = []
    for rank in (1, 4, 12):
        made, state = convert_to_lora(model, rank, progressbar=rank == 4)
        assert (made.r, made.lora_alpha, made.rank_pattern) == (rank, rank, {})
        assert {len(v) for k, v in state.items() if "lora_A" in k} == {rank}
        captured = capsys.readouterr()
        assert ("Converting to LoRA" in captured.err) == (rank == 4)
        errors.append(float(captured.out.split("weights ")[1].split(",")[0]))
        lost = total = 0.0
        for path, layer in model.methods["default"].layers(model):
            delta = layer.frozen.rows(layer.get_delta_weight("default"))
            a, b = (state[f"base_model.model.{path}.lora_{n}.weight"] for n in "AB")
            lost, total = lost + (delta - b @ a).square().sum().item(), total + delta.square().sum().item()
        assert errors[-1] == pytest.approx((lost / total) ** 0.5, rel=1e-2)
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.1
    made, state = convert_to_lora(model, 0.9)
    assert made.r == 1 and made.rank_pattern == made.alpha_pattern
    assert all(len(state[f"base_model.model.{p}.lora_A.weight"]) == r for p, r in made.rank_pattern.items())


def test_factors_beyond_the_updates_rank(tmp_path: Path) -> None:
    model = attach("llama", "lora")
    wanted = logits_of(model, **INPUTS)
    save_as_lora(tmp_path, model, 9)
    close(logits_of(graftlm.PeftModel.from_pretrained(fresh("llama"), tmp_path), **INPUTS), wanted)
    untrained = graftlm.get_peft_model(fresh("llama"), config("vera", "llama"))
    made, _ = convert_to_lora(untrained, 0.5)
    assert set(made.rank_pattern.values()) == {1}


def test_one_of_several_and_merged() -> None:
    model = attach("llama", "lora")
    model.add_adapter("other", config("lokr", "llama"))
    model.set_adapter("other")
    randomise(model, scale=0.3)
    _, wanted = convert_to_lora(model, 2, "other")
    model.merge_adapter()
    _, merged = convert_to_lora(model, 2, "other")
    assert all(torch.equal(merged[k], v) for k, v in wanted.items())
    assert not any(torch.equal(v, wanted[k]) for k, v in convert_to_lora(model, 2)[1].items())


def test_what_cannot_become_lora() -> None:
    for method in ("prompt", "prefix", "houlsby", "ln_tuning", "bias_all"):
        model = attach("opt", method)
        assert not model.supports_lora_conversion()
        with pytest.raises(UnsupportedError, match="Adapter 'default' .*, which LoRA's factors cannot hold"):
            convert_to_lora(model, 4)
    with pytest.raises(UnsupportedError, match="is IA3 and changes the bias of 'model.decoder.layers.0.self_attn.k_proj'"):
        convert_to_lora(attach("opt", "ia3"), 4)
    model = attach("llama", "lokr")
    assert model.supports_lora_conversion()
    for rank in (0, -1, 1.5, 0.0, True, "4"):
        with pytest.raises(ConfigError, match="expected a whole number above 0, or a share"):
            convert_to_lora(model, rank)
    with pytest.raises(ConfigError, match="rank=33: .* is 32 x 32, so 32 is the most"):
        convert_to_lora(model, 33)
    with pytest.raises(AdapterError, match="no adapter 'none'"):
        convert_to_lora(model, 4, "none")
    with pytest.raises(TypeError, match="convert_to_lora takes what get_peft_model"):
        convert_to_lora(fresh("llama"), 4)


def test_lora_that_trains_tokens_of_tied_embeddings() -> None:
    """The head follows the embeddings' rows; as LoRA each has factors of its own."""
    base = fresh("gpt2")
    assert base.lm_head.weight is base.transformer.wte.weight
    made = graftlm.LoraConfig(task_type="CAUSAL_LM", r=2, trainable_token_indices=[5, 6], target_modules=["c_attn"])
    model = randomise(graftlm.get_peft_model(base, made)).eval()
    config, state = graftlm.convert_to_lora(model, rank=8)
    other = graftlm.get_peft_model(fresh("gpt2"), config).eval()
    graftlm.set_peft_model_state_dict(other, state)
    ids = torch.tensor([[5, 6, 7, 8]])
    close(logits_of(other, input_ids=ids), logits_of(model, input_ids=ids), 1e-3)
