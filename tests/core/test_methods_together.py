"""Trained tokens, LLaMA-Adapter, cartridges and multitask prompts in joint passes and in a server's steps, beside LoRA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import SEQ2SEQ, task
from helpers import attach, config, fresh, randomise, still
from test_joint import batches, each_is_as_alone
from test_served import Server, check, group_of, prompts

import graftlm
from graftlm.joint import joinable

SETS = ("lora_tokens", "tokens", "cartridge", "lora", "adaption", "one_task")


@pytest.mark.parametrize("name", ["llama", "bloom", "t5"])
def test_each_share_is_as_alone(name: str) -> None:
    base, models = still(name), []
    for method in SETS if name not in SEQ2SEQ else SETS[:4]:
        one_task = graftlm.MultitaskPromptTuningConfig(task_type=task(name), num_virtual_tokens=3)
        settings = one_task if method == "one_task" else config(method, name)
        models.append(randomise(graftlm.get_peft_model(base, settings)).train())
    data = batches(name, len(models))
    for inputs in data:
        inputs["input_ids"][:, 1] = 5  # a trained token
    each_is_as_alone(models, data)


def test_virtual_tokens_of_a_decoder_run_alone() -> None:
    """Beside other runs' prefixes they would have no place there."""
    model = graftlm.get_peft_model(fresh("t5"), graftlm.MultitaskPromptTuningConfig(task_type="SEQ_2_SEQ_LM"))
    assert not joinable(model, batches("t5", 1)[0])


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "qwen3"])
def test_steps_of_a_server(name: str) -> None:
    model = attach(name, "tokens")
    for i, method in enumerate(("lora_tokens", "adaption", "cartridge")):
        model.add_adapter(method, config(method, name))
        model.set_adapter(method)
        randomise(model, seed=i, scale=0.3)
    model.eval()
    entries: list[Any] = ["default", "lora_tokens", "adaption", "cartridge", ["lora_tokens", "adaption"], "__base__"]
    entries.append(["cartridge", "adaption"])
    texts = [torch.cat((text, torch.tensor([5, 90]))) for text in prompts(len(entries))]
    server = Server(model)
    for i, (entry, text) in enumerate(zip(entries, texts, strict=True)):
        server.join(i, group_of(entry), text)
    while server.running:
        server.step()
    check(model, entries, texts, server)


def test_wrappers_over_one_base_do_not_see_each_others_tokens() -> None:
    base = fresh("llama")
    first = graftlm.get_peft_model(base, config("tokens", "llama"))
    second = graftlm.get_peft_model(base, graftlm.TrainableTokensConfig(token_indices=[7]))
    randomise(first)
    ids = torch.tensor([[5, 7, 90, 11]])
    with torch.no_grad():
        wanted, plain = first.eval()(input_ids=ids).logits, fresh("llama")(input_ids=ids).logits
        torch.testing.assert_close(second.eval()(input_ids=ids).logits, plain)
        assert (wanted - plain).abs().max() > 1e-2
        first.add_adapter("more", graftlm.TrainableTokensConfig(token_indices=[11]))
        first.set_adapter(["default", "more"])
        torch.testing.assert_close(first(input_ids=ids).logits, wanted)
