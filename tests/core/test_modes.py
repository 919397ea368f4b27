"""Evaluation mode for a while, and the base's own module inside all that is put around it."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers
from helpers import close, config, fresh
from torch import nn

import graftlm
from graftlm.adapters import AdapterSet
from graftlm.architectures import base_modules, innermost
from graftlm.modes import evaluating


def modes(model: nn.Module) -> list[bool]:
    return [m.training for m in model.modules()]


def mixed_up(model: nn.Module) -> list[bool]:
    """Put the modules into unlike modes; returns them."""
    for i, module in enumerate(model.modules()):
        module.training = i % 3 > 0
    return modes(model)


def test_every_module_has_its_own_mode_back() -> None:
    model, other = fresh("llama"), nn.Dropout()
    before = mixed_up(model)
    kept = [m for m in model.modules() if isinstance(m, nn.Linear)]
    with pytest.raises(ZeroDivisionError), evaluating(model, other, but=set(kept)):
        assert not other.training
        assert {m for m in model.modules() if m.training} == {
            m for m, mode in zip(model.modules(), before, strict=True) if mode and m in kept
        }
        model.train()
        raise ZeroDivisionError
    assert modes(model) == before and other.training


class Words:
    """A tokenizer of one text."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [5, 6, 7]}


def test_a_prefix_from_text_leaves_modes_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the base fails."""
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: Words())
    text = graftlm.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, init_weights="text", init_text="x", tokenizer_name_or_path="y"
    )
    model = graftlm.get_peft_model(fresh("llama"), config("prefix", "llama"))
    before = mixed_up(model.base)
    model.add_adapter("text", text)
    assert modes(model.base) == before

    def fails(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(model.base.model.layers[0], "forward", fails)
    with pytest.raises(ZeroDivisionError):
        model.add_adapter("again", text)
    assert modes(model.base) == before and model.active_adapters == ["default"] and "again" not in model.peft_config


def test_saving_a_soft_prompt_leaves_modes_as_they_were() -> None:
    model = graftlm.get_peft_model(fresh("llama"), config("p_tuning_mlp", "llama"))
    encoder = model.prompt_encoder["default"]
    before = mixed_up(encoder)
    graftlm.get_peft_model_state_dict(model)
    assert modes(encoder) == before


def test_innermost() -> None:
    base = fresh("llama")
    plain = {path: module for path, module in base.named_modules() if isinstance(module, nn.Linear)}
    settings: Any = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = graftlm.get_peft_model(base, graftlm.LoraConfig(**settings))
    second = graftlm.get_peft_model(base, graftlm.LoraConfig(**settings))
    for around in (base, model, second, nn.DataParallel(model), torch.compile(model), torch.compile(nn.DataParallel(base))):
        assert innermost(around) is base
    inside = {innermost(module) for _, module in base_modules(base)}
    assert set(plain.values()) <= inside
    assert innermost(base.get_submodule("lm_head")) is plain["lm_head"]
    assert innermost(AdapterSet(base)) is base
    theirs = fresh("llama")
    assert innermost(peft.get_peft_model(theirs, config("lora", "llama", peft))) is theirs


def test_preparing_leaves_adapters_trainable() -> None:
    model = graftlm.get_peft_model(fresh("llama"), config("lora", "llama"))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    before = [p.detach().clone() for p in model.parameters()]
    graftlm.prepare_model_for_kbit_training(torch.compile(model), use_gradient_checkpointing=False)
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad} and trained
    for a, b in zip(before, model.parameters(), strict=True):
        close(a, b)
