"""Joint training passes: adapters of several wrappers over one base, each as if it were alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import SEQ2SEQ, VOCAB
from helpers import still, task
from test_mixing import everything, gradients, padded
from torch import Tensor

import graftlm
from graftlm.joint import Share, joinable, joint_losses
from graftlm.routing import Draws


def wrappers(name: str, kinds: list[str], **options: Any) -> list[Any]:
    base = still(name)
    made = [graftlm.get_peft_model(base, everything(name, **options)[kind]) for kind in kinds]
    generator = torch.Generator().manual_seed(7)
    for model in made:
        with torch.no_grad():
            for _, p in model.adapter_parameters("default"):
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
        model.train()
    return made


def batches(name: str, count: int) -> list[dict[str, Tensor]]:
    found = []
    for i in range(count):
        inputs = padded(2 + i % 3, "left" if i % 2 else "right", seed=i)
        if name in SEQ2SEQ:
            inputs["labels"] = torch.randint(3, VOCAB, (len(inputs["input_ids"]), 3 + i % 2))
        else:
            inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
            first = inputs["attention_mask"].cumsum(-1).eq(1)
            inputs["labels"] = inputs["labels"].masked_fill(first, -100)
        found.append(inputs)
    return found


KINDS = ["lora", "prompt", "prefix", "houlsby", "wide", "p_mlp", "dora", "prefix_mlp", "parallel", "longer"]


def each_is_as_alone(models: list[Any], data: list[dict[str, Tensor]]) -> None:
    """Loss and gradients of each wrapper's share of a joint pass are those of its own pass."""
    wanted = []
    for model, inputs in zip(models, data, strict=True):
        loss = model(**inputs).loss
        loss.backward()
        wanted.append((float(loss.detach()), gradients(model)))
    assert all(joinable(m, i) for m, i in zip(models, data, strict=True))
    found = joint_losses([Share(m, i) for m, i in zip(models, data, strict=True)])
    assert found is not None
    means = [total / count for total, count in found]
    torch.stack(means).sum().backward()
    for model, mean, (loss, expected) in zip(models, means, wanted, strict=True):
        assert abs(float(mean.detach()) - loss) <= 1e-5 * abs(loss)
        got = gradients(model)
        shown = {k for k, v in expected.items() if v.abs().max() > 0}
        assert shown <= set(got) and shown
        for key in shown:
            torch.testing.assert_close(got[key], expected[key], rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("name", ["bloom", "opt", "llama", "gemma3", "chatglm", "t5", "bart"])
def test_each_share_is_as_alone(name: str) -> None:
    models = wrappers(name, KINDS)
    each_is_as_alone(models, batches(name, len(models)))


def test_heads_that_are_trained() -> None:
    base = still("llama")
    options = {"task_type": task("llama"), "r": 2}
    models = [
        graftlm.get_peft_model(base, graftlm.LoraConfig(**options, modules_to_save=["lm_head"])),
        graftlm.get_peft_model(base, graftlm.LoraConfig(**options, modules_to_save=["lm_head"])),
        graftlm.get_peft_model(base, graftlm.LoraConfig(**options, target_modules=["embed_tokens"])),
    ]
    data = batches("llama", 3)
    wanted = []
    for model, inputs in zip(models, data, strict=True):
        model.train()
        loss = model(**inputs).loss
        loss.backward()
        wanted.append((float(loss.detach()), gradients(model)))
    found = joint_losses([Share(m, i) for m, i in zip(models, data, strict=True)])
    assert found is not None
    torch.stack([total / count for total, count in found]).sum().backward()
    for model, (total, count), (loss, expected) in zip(models, found, wanted, strict=True):
        assert abs(float(total.detach()) / count - loss) <= 1e-5 * abs(loss)
        got = gradients(model)
        for key, value in expected.items():
            torch.testing.assert_close(got.get(key, torch.zeros_like(value)), value, rtol=1e-3, atol=2e-6)


def test_dropout_is_drawn_as_alone() -> None:
    base = still("llama")
    common = {"task_type": "CAUSAL_LM"}
    configs = [
        graftlm.LoraConfig(**common, r=3, lora_dropout=0.3),
        graftlm.BottleneckConfig(**common, reduction_factor=4, dropout=0.3),
        graftlm.PromptEncoderConfig(
            **common,
            num_virtual_tokens=3,
            encoder_hidden_size=8,
            encoder_reparameterization_type="LSTM",
            encoder_dropout=0.3,
        ),
        graftlm.LoraConfig(**common, r=3, lora_dropout=0.2, use_dora=True),
    ]
    models = [graftlm.get_peft_model(base, c) for c in configs]
    data = [{k: v.repeat(4, 1) for k, v in b.items()} for b in batches("llama", len(models))]
    streams, wanted = [], []
    for seed, (model, inputs) in enumerate(zip(models, data, strict=True)):
        model.train()
        with torch.no_grad():
            for _, p in model.adapter_parameters("default"):
                p.add_(torch.randn_like(p) * 0.1)
        model(**inputs)  # the first pass tries the short cuts out
        torch.manual_seed(seed)
        streams.append(torch.get_rng_state())
        model(**inputs).loss.backward()
        wanted.append((gradients(model), torch.get_rng_state()))
    draws = [Draws(state) for state in streams]
    found = joint_losses([Share(m, i, d) for m, i, d in zip(models, data, draws, strict=True)])
    assert found is not None
    torch.stack([total / count for total, count in found]).sum().backward()
    for model, stream, (expected, after) in zip(models, draws, wanted, strict=True):
        got = gradients(model)
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, rtol=1e-3, atol=2e-6, msg=lambda m, key=key: f"{key}: {m}")
        assert torch.equal(stream.state, after)


def test_a_share_of_nan_reaches_nobody_else() -> None:
    models = wrappers("llama", ["lora", "wide", "prefix"])
    data = batches("llama", 3)
    joint_losses([Share(m, i) for m, i in zip(models, data, strict=True)])
    with torch.no_grad():
        for _, p in models[1].adapter_parameters("default"):
            p.fill_(torch.nan)
    found = joint_losses([Share(m, i) for m, i in zip(models, data, strict=True)])
    assert found is not None
    losses = [total / count for total, count in found]
    assert [bool(torch.isfinite(x)) for x in losses] == [True, False, True]
    (losses[0] + losses[2]).backward()
    for model in (models[0], models[2]):
        got = gradients(model)
        assert got and all(bool(torch.isfinite(g).all()) for g in got.values())


def test_what_cannot_be_joined() -> None:
    (model,) = wrappers("llama", ["lora"])
    (inputs,) = batches("llama", 1)
    assert not joinable(model, inputs | {"token_type_ids": inputs["input_ids"]})
    assert not joinable(model.base, inputs)
    assert not joinable(model, {"input_ids": inputs["input_ids"]})
    model.lean = False
    assert not joinable(model, inputs)
