"""`prepare_model_for_kbit_training`: what it casts and prints, and that it computes as HF PEFT's where both use fp32."""

from __future__ import annotations

import copy
import re

import peft
import pytest
import torch
from families import batch
from helpers import attach, cases, close, config, logits_of, randomise
from test_quantized import PROJECTION, folders, load  # noqa: F401  (a fixture)
from torch import nn

import graftlm
from graftlm import preparation
from graftlm.preparation import Float32Head


@pytest.mark.parametrize("name", ["llama", "opt", "bloom"])
def test_casts_are_printed_and_nothing_else_changes(folders, name, capsys):  # noqa: F811
    base = load(folders[name], "nf4", dtype=torch.bfloat16, compute=torch.bfloat16)
    dtypes = {k: p.dtype for k, p in base.named_parameters()}
    size = base.get_memory_footprint()
    assert graftlm.prepare_model_for_kbit_training(base) is base
    printed = capsys.readouterr().out
    changed = {k: p for k, p in base.named_parameters() if p.dtype != dtypes[k]}
    norms = {f"{n}.{k}" for n, m in base.named_modules() if "Norm" in type(m).__name__ for k, _ in m.named_parameters()}
    assert changed.keys() == norms and all(p.dtype is torch.float32 for p in changed.values())
    added = base.get_memory_footprint() - size
    assert added == sum(p.numel() * 2 for p in changed.values())
    stated = [int(x.replace(",", "")) for x in re.findall(r"bfloat16 -> float32, ([\d,]+) bytes", printed)]
    assert sum(stated) == sum(p.numel() * 4 for p in changed.values())
    assert "no copy, 0 bytes" in printed and type(base.get_output_embeddings()) is Float32Head
    if name != "bloom":
        assert "layers.*." in printed
    assert not any(p.requires_grad for p in base.parameters()) and base.is_gradient_checkpointing
    graftlm.prepare_model_for_kbit_training(base)
    assert capsys.readouterr().out == ""  # nothing is left to cast


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_activations_keep_their_dtype(folders, name):  # noqa: F811
    base = graftlm.prepare_model_for_kbit_training(load(folders[name], "nf4", dtype=torch.bfloat16, compute=torch.bfloat16))
    seen = set()
    for module in base.modules():
        if PROJECTION[name] in str(getattr(module, "_name", "")) or "norm" in type(module).__name__.lower():
            module.register_forward_hook(lambda m, a, out: seen.add(out.dtype))
    assert logits_of(base.eval(), **batch(name)).dtype is torch.float32
    assert seen == {torch.bfloat16}


def test_the_heads_product_is_in_float32(monkeypatch):
    monkeypatch.setattr(preparation, "TILE", 8 * 12)  # several tiles, the last one shorter
    torch.manual_seed(0)
    for bias in (False, True):
        head = nn.Linear(12, 30, bias=bias).bfloat16().requires_grad_(False)
        wide = copy.deepcopy(head).float()
        head.__class__ = Float32Head
        x = torch.randn(2, 5, 12, dtype=torch.bfloat16)
        ours, theirs = x.clone().requires_grad_(), x.float().requires_grad_()
        out, wanted = head(ours), wide(theirs)
        close(out, wanted)
        gradient = torch.randn_like(wanted)
        out.backward(gradient)
        wanted.backward(gradient)
        assert ours.grad is not None and ours.grad.dtype is torch.bfloat16
        close(ours.grad, theirs.grad.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            assert head(x).dtype is torch.bfloat16
        close(head(x.expand(4, 2, 5, 12)), wanted.detach().expand(4, 2, 5, 30))  # evaluation
        step = head(x[:, :1])  # decoding: the same rounded to the head's dtype
        assert step.dtype is torch.float32
        close(step, wanted[:, :1].detach().bfloat16().float(), 0.02)


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
def test_float16_on_a_cpu_becomes_float32_as_with_hf_peft(folders, method, capsys):  # noqa: F811
    ours, theirs = (load(folders["llama"], "nf4", dtype=torch.float16, compute=torch.float16) for _ in range(2))
    graftlm.prepare_model_for_kbit_training(ours)
    printed = capsys.readouterr().out
    assert "embed_tokens.weight: float16 -> float32 (a CPU cannot train in float16)" in printed
    assert "products in float32 instead of float16" in printed
    mine = attach("llama", method, base=ours).train()
    inputs = batch("llama")
    loss = mine(**inputs).loss
    loss.backward()
    other = attach("llama", method, base=peft.prepare_model_for_kbit_training(theirs)).eval()
    for module in other.modules():  # in float16 products HF PEFT's differs by their rounding
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32
    close(mine.eval()(**inputs).loss, other(**inputs).loss)


@pytest.mark.parametrize(
    ("method", "scheme"),
    cases(
        ["lora", "dora", "prompt", "p_tuning_mlp", "prefix", "houlsby"], ["int8", "nf4"],
        lambda m, s: m == "lora" or (m in ("dora", "prefix", "p_tuning_mlp")) == (s == "int8"),
    ),
)  # fmt: skip
def test_checkpointed_gradients_are_the_plain_ones(folders, scheme, method, capsys):  # noqa: F811
    gradients = []
    for checkpointing in (False, True):
        base = load(folders["llama"], scheme)
        base = graftlm.prepare_model_for_kbit_training(base, use_gradient_checkpointing=checkpointing)
        assert base.is_gradient_checkpointing == checkpointing
        model = attach("llama", method, base=base).train()
        model(**batch("llama")).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        close(recomputed, plain)


def test_bf16_training_is_near_fp32_training(folders, capsys):  # noqa: F811
    """The whole path in bf16 (activations, 4-bit products, fp32 norms and head) against fp32."""
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        base = load(folders["llama"], "nf4", dtype=dtype, compute=dtype)
        model = attach("llama", "lora", base=graftlm.prepare_model_for_kbit_training(base)).train()
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        run = []
        for _ in range(8):
            loss = model(**batch("llama")).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            run.append(loss.item())
        losses.append(run)
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    assert losses[1][-1] < losses[1][0]


def test_an_unquantised_model_is_only_frozen_and_cast(folders, capsys):  # noqa: F811
    base = graftlm.prepare_model_for_kbit_training(load(folders["llama"], None, dtype=torch.bfloat16))
    assert not base.is_gradient_checkpointing and not any(p.requires_grad for p in base.parameters())
    model = randomise(graftlm.get_peft_model(base, config("lora", "llama"))).train()
    model(**batch("llama")).loss.backward()


def test_adapters_of_a_wrapped_base_stay_trainable(folders, capsys):  # noqa: F811
    base = load(folders["llama"], "nf4")
    first, second = (graftlm.get_peft_model(base, config(m, "llama")) for m in ("lora", "prompt"))
    trained = [{k for k, p in m.named_parameters() if p.requires_grad} for m in (first, second)]
    for prepared in (base, first, second):
        graftlm.prepare_model_for_kbit_training(prepared)
        assert [{k for k, p in m.named_parameters() if p.requires_grad} for m in (first, second)] == trained


def test_a_norm_that_was_trained_is_saved_in_float32(folders, tmp_path, capsys):  # noqa: F811
    def prepared():
        base = load(folders["llama"], "nf4", dtype=torch.bfloat16, compute=torch.bfloat16)
        return graftlm.prepare_model_for_kbit_training(base)

    settings = graftlm.LoraConfig(task_type="CAUSAL_LM", modules_to_save=["model.norm"])
    model = randomise(graftlm.get_peft_model(prepared(), settings)).eval()
    model.save_pretrained(tmp_path)
    again = graftlm.PeftModel.from_pretrained(prepared(), tmp_path)
    for (key, mine), (_, theirs) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), key
