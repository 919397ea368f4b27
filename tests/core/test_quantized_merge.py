"""Merging into quantised layers: bf16 copies by default, requantised only on request, the drift printed."""

from __future__ import annotations

import re

import pytest
import torch
from families import batch, build
from helpers import attach, close, config, logits_of, randomise, state_of
from test_quantized import folders, layers, load, settings  # noqa: F401  (a fixture)
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import graftlm
from graftlm.layers import as_it_was
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
    assert layer.frozen.layer.weight.dtype is torch.bfloat16
    exact = dequantize(as_it_was(layer.frozen.layer)).float() + layer.get_delta_weight("default")
    close(layer.frozen.layer.weight.float(), exact, 2**-8 * exact.abs().max().item())
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
    exact = {n: dequantize(m.frozen.layer).float() + m.get_delta_weight("default") for n, m in lora_layers(model)}
    model.merge_adapter(requantize=True)
    assert "layers were quantised anew" in capsys.readouterr().out
    assert scheme_of(model.base) == scheme
    for name, layer in lora_layers(model):
        assert quantized_kind(layer.frozen.layer) is not None
        step = exact[name].abs().max().item() * (1 / 127 if scheme == "int8" else 0.2)
        close(dequantize(layer.frozen.layer).float(), exact[name], step)
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


@pytest.mark.parametrize("method", ["bias_lora_only", "bias_all"])
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_trained_biases_stay_while_merged(folders, scheme, method, capsys):  # noqa: F811
    base = load(folders["opt"], scheme)
    model = attach("opt", method, base=base)
    with torch.no_grad():
        for parameter in model.adapter_biases.parameters():
            parameter.add_(1.0)
    other = graftlm.get_peft_model(base, config("lora", "opt"))  # as yet it changes nothing
    inputs = batch("opt")
    wanted = logits_of(model, **inputs)
    model.merge_adapter()
    assert relative(logits_of(model, **inputs), wanted) < 0.05
    close(logits_of(model, **inputs, adapter_names=["default", "default", "default"]), logits_of(model, **inputs), 0)
    model.requires_grad_(False)
    model.set_requires_grad("default")
    with torch.enable_grad():  # a pass that gradients go through is computed by the layer as it was
        close(model(**inputs).logits.detach(), wanted, 1e-5)
    model.unmerge_adapter()
    close(logits_of(model, **inputs), wanted, 0)
    other.merge_adapter()  # another wrapper replaces the layers that the biases' hooks stand on
    close(logits_of(model, **inputs), wanted, 0.05 * wanted.abs().max().item())
    other.unmerge_adapter()
    close(logits_of(model, **inputs), wanted, 0)


@pytest.mark.parametrize("requantize", [False, True])
def test_disabling_keeps_merged_layers_as_they_are(folders, requantize, capsys):  # noqa: F811
    model = attach("llama", "lora", base=load(folders["llama"], "nf4"))
    inputs = batch("llama")
    with model.disable_adapter():
        plain = logits_of(model, **inputs)
    model.merge_adapter(requantize=requantize)
    merged, wanted = [m.frozen.layer for _, m in lora_layers(model)], logits_of(model, **inputs)
    capsys.readouterr()
    with model.disable_adapter():
        close(logits_of(model, **inputs), plain, 0)
    assert capsys.readouterr().out == ""
    assert all(m.frozen.layer is kept for (_, m), kept in zip(lora_layers(model), merged, strict=True))
    close(logits_of(model, **inputs), wanted, 0)


@pytest.mark.parametrize("scheme", [None, "nf4"])
def test_a_refused_merge_changes_nothing(folders, scheme):  # noqa: F811
    model = attach("llama", "lora", base=load(folders["llama"], scheme))
    last = lora_layers(model)[-1][1]
    with torch.no_grad():
        last.lora_A["default"].weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="nothing was changed"):
        model.merge_adapter(safe_merge=True)
    assert not any(m.merged for _, m in lora_layers(model))


@pytest.mark.parametrize("targets", [["c_attn", "c_proj"], ["c_fc"]], ids=["two", "one"])
@pytest.mark.parametrize("requantize", [False, True])
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_gpt2s_layers_are_saved_in_its_own_layout(tmp_path, scheme, requantize, targets, capsys):
    build("gpt2", n_embd=64).save_pretrained(tmp_path / "base")
    lora = graftlm.LoraConfig(task_type="CAUSAL_LM", target_modules=targets)
    model = randomise(graftlm.get_peft_model(load(tmp_path / "base", scheme), lora)).eval()
    merged = model.merge_and_unload(requantize=requantize)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", device_map="cpu").eval()
    again.train(scheme == "nf4")
    for module in again.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    close(logits_of(again, **batch("gpt2")), logits_of(merged, **batch("gpt2")))
    assert len(layers(again)) == len(layers(merged)) == (8 if requantize else 2 if len(targets) == 2 else 6)


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_quantised_heads_are_trained_and_merged(tmp_path, name, scheme, capsys):
    """transformers quantises a classifier's head too: one layer (BERT's), or a module of two (RoBERTa's)."""

    def loaded(folder):
        options = {"quantization_config": settings(scheme)} if folder.name == "base" else {}
        return AutoModelForSequenceClassification.from_pretrained(folder, device_map="cpu", dtype=torch.float32, **options)

    build(name, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    model = randomise(graftlm.get_peft_model(loaded(tmp_path / "base"), config("lora_default", name)))
    inputs = batch(name)
    model.train()(**inputs).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    wanted = logits_of(model.eval(), **inputs)
    model.save_pretrained(tmp_path / "adapter")
    close(logits_of(graftlm.PeftModel.from_pretrained(loaded(tmp_path / "base"), tmp_path / "adapter"), **inputs), wanted)
    merged = model.merge_and_unload()
    assert relative(logits_of(merged, **inputs), wanted) < 0.1
    merged.save_pretrained(tmp_path / "merged")
    again = graftlm.get_peft_model(loaded(tmp_path / "merged").eval(), config("lora_default", name))
    with again.disable_adapter():
        close(logits_of(again, **inputs), logits_of(merged, **inputs))


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_a_merged_model_that_was_prepared_reloads_in_plain_transformers(folders, scheme, tmp_path, capsys):  # noqa: F811
    """Norms compute in fp32 but are saved as they came, beside the other 16-bit weights."""
    base = graftlm.prepare_model_for_kbit_training(
        load(folders["llama"], scheme, dtype=torch.bfloat16, **({"compute": torch.bfloat16} if scheme == "nf4" else {}))
    )
    model = attach("llama", "lora_default", base=base)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu").eval()
    assert {p.dtype for p in again.parameters() if p.is_floating_point()} == {torch.bfloat16}
    assert relative(logits_of(again, **batch("llama")).float(), logits_of(merged, **batch("llama"))) < 0.03


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]], ids=["all", "some"])
def test_a_base_that_was_saved_quantised_is_merged_and_saved(folders, scheme, targets, tmp_path, capsys):  # noqa: F811
    load(folders["llama"], scheme).save_pretrained(tmp_path / "quantised")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised", device_map="cpu")
    model = graftlm.get_peft_model(base, graftlm.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    merged = model.eval().merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", device_map="cpu").train(scheme == "nf4")
    inputs = batch("llama")
    close(logits_of(again, **inputs).float(), logits_of(merged, **inputs).float())
