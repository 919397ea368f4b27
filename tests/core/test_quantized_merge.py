"""Merging into quantised layers: bf16 copies by default, requantised only on request, the drift printed."""

from __future__ import annotations

import re

import pytest
import torch
from families import batch
from helpers import attach, close, logits_of, state_of
from test_quantized import folders, layers, load  # noqa: F401  (a fixture)
from torch import nn
from transformers import AutoModelForCausalLM

import graftlm
from graftlm.quantization import dequantize, is_quantized, quantized_kind, scheme_of


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("method", ["lora", "dora", "patterns"])
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_merging_makes_bf16_copies_and_unmerging_gives_the_base_back(folders, scheme, method, capsys):  # noqa: F811
    base = load(folders["llama"], scheme)
    model = attach("llama", method, base=base)
    inputs = batch("llama")
    wanted, state = logits_of(model, **inputs), state_of(base)
    with model.disable_adapter():
        plain = logits_of(model, **inputs)
    model.merge_adapter()
    printed = capsys.readouterr().out
    kind = "int8" if scheme == "int8" else "4bit"
    assert f"14 {kind} layers became bfloat16 copies" in printed
    drift = float(re.search(r"move by up to (\S+)", printed)[1])
    layer = model.base.model.layers[0].self_attn.q_proj
    assert layer.frozen.weight.dtype is torch.bfloat16
    exact = dequantize(layer.saved_layer).float() + layer.get_delta_weight("default")
    close(layer.frozen.weight.float(), exact, 2**-8 * exact.abs().max().item())
    got = logits_of(model, **inputs)
    assert drift > 0 and 0 < relative(got, wanted) < 0.06
    with model.disable_adapter():
        close(logits_of(model, **inputs), plain)
    model.unmerge_adapter()
    close(logits_of(model, **inputs), wanted, 0)
    for key, value in base.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("scheme", ["int8", "nf4", "fp4"])
def test_requantising_on_request(folders, scheme, capsys):  # noqa: F811
    model = attach("llama", "lora", base=load(folders["llama"], scheme))
    inputs = batch("llama")
    wanted = logits_of(model, **inputs)
    exact = {n: dequantize(m.frozen).float() + m.get_delta_weight("default") for n, m in lora_layers(model)}
    model.merge_adapter(requantize=True)
    assert "layers were quantised anew" in capsys.readouterr().out
    assert scheme_of(model.base) == scheme
    for name, layer in lora_layers(model):
        assert quantized_kind(layer.frozen) is not None
        step = exact[name].abs().max().item() * (1 / 127 if scheme == "int8" else 0.2)
        close(dequantize(layer.frozen).float(), exact[name], step)
    assert relative(logits_of(model, **inputs), wanted) < (0.1 if scheme == "int8" else 0.8)
    model.unmerge_adapter()
    close(logits_of(model, **inputs), wanted, 0)


def lora_layers(model):
    return [(n, m) for n, m in model.base.named_modules() if hasattr(m, "lora_A")]


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]], ids=["all", "some"])
def test_a_merged_model_reloads_in_plain_transformers(folders, scheme, targets, tmp_path, capsys):  # noqa: F811
    base = load(folders["llama"], scheme)
    settings = graftlm.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets)
    model = graftlm.get_peft_model(base, settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    merged = model.eval().merge_and_unload()
    assert not any("lora" in n for n, _ in merged.named_modules())
    assert is_quantized(merged) == (targets != "all-linear")
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu").eval()
    assert len(layers(again)) == len(layers(merged)) == (0 if targets == "all-linear" else 10)
    inputs = batch("llama")
    again.train(scheme == "nf4")  # in evaluation mode bitsandbytes itself would compute 4-bit layers in bf16
    close(logits_of(again, **inputs).float(), logits_of(merged, **inputs).float())
    # and it can be adapted once more
    once_more = attach("llama", "lora", base=again)
    once_more.train()(**inputs).loss.backward()


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_two_wrappers_share_a_merged_base(folders, scheme, capsys):  # noqa: F811
    base = load(folders["llama"], scheme)
    inputs = batch("llama")
    one, other = attach("llama", "lora", base=base), attach("llama", "prompt", base=base, seed=3)
    wanted = logits_of(other, **inputs)
    one.merge_adapter()
    one.unmerge_adapter()
    close(logits_of(other, **inputs), wanted, 0)
    assert isinstance(one.unload().model.layers[0].self_attn.q_proj, nn.Linear)
    close(logits_of(other, **inputs), wanted, 0)
