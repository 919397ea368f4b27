"""Requests through the engine, and the same ones alone through `generate`."""

from __future__ import annotations

import random
from typing import Any

import torch
from families import VOCAB, randomise
from helpers import IA3, TARGETS, fresh

import graftlm
from graftlm.inference.engine import Engine, EngineConfig
from graftlm.inference.handle import Handle
from graftlm.inference.requests import Request, SamplingParams


def everything(name: str) -> dict[str, Any]:
    """A configuration of every method for a family, in several sizes."""
    causal: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    lora = causal | {"target_modules": TARGETS.get(name)}
    return {
        "lora": graftlm.LoraConfig(r=4, **lora),
        "wide": graftlm.LoraConfig(r=9, lora_alpha=3, **lora | {"target_modules": "all-linear"}),
        "dora": graftlm.LoraConfig(r=2, use_dora=True, **lora),
        "ia3": graftlm.IA3Config(**causal, **IA3.get(name, {})),
        "loha": graftlm.LoHaConfig(**causal, r=3, target_modules="all-linear"),
        "prompt": graftlm.PromptTuningConfig(num_virtual_tokens=3, **causal),
        "p_mlp": graftlm.PromptEncoderConfig(num_virtual_tokens=2, encoder_hidden_size=8, **causal),
        "prefix": graftlm.PrefixTuningConfig(num_virtual_tokens=5, **causal),
        "prefix_mlp": graftlm.PrefixTuningConfig(num_virtual_tokens=2, prefix_projection=True, **causal),
        "houlsby": graftlm.BottleneckConfig(placement="houlsby", reduction_factor=4, **causal),
        "parallel": graftlm.BottleneckConfig(placement="parallel", reduction_factor=4, **causal),
    }


def crowd(name: str, kinds: list[str] | None = None, base: Any = None) -> Any:
    """A model with adapters of these kinds (all)."""
    chosen = {k: v for k, v in everything(name).items() if kinds is None or k in kinds}
    first, *others = chosen
    model = graftlm.get_peft_model(fresh(name) if base is None else base, chosen[first], first)
    for key in others:
        model.add_adapter(key, chosen[key])
    model.set_requires_grad(list(model.methods), True)
    randomise(model)
    return model.eval()


class Names:
    """A tokenizer of tiny models: a letter a token."""

    eos_token_id, pad_token_id = 2, 0

    def decode(self, ids: Any, **options: Any) -> str:
        return "".join(chr(0x4E00 + i) for i in ids if i > 2)

    def __len__(self) -> int:
        return VOCAB


def engine_of(model: Any, **config: Any) -> Engine:
    """An engine that runs only when it is told to (see `run`)."""
    return Engine(model, Names(), EngineConfig(**{"prepack": False, "step_tokens": 16} | config))


def run(engine: Engine, handles: list[Handle] | None = None, limit: int = 20_000) -> None:
    """Work until all is done."""
    with torch.no_grad():
        for _ in range(limit):
            if not engine.work() and not engine._jobs:
                return
    raise AssertionError("stuck")


def alone(model: Any, request: Request, index: int = 0) -> list[int]:
    """What `generate` writes for this request by itself."""
    p = request.params
    options: dict[str, Any] = {
        "max_new_tokens": p.max_new_tokens, "do_sample": p.temperature > 0, "repetition_penalty": p.repetition_penalty,
        "pad_token_id": 0, "eos_token_id": VOCAB + 1 if p.ignore_end else [2, 0],
    }  # fmt: skip
    if p.temperature > 0:
        options |= {"temperature": p.temperature, "top_p": p.top_p, "top_k": p.top_k, "min_p": p.min_p or None}
    if p.min_new_tokens:
        options["min_new_tokens"] = p.min_new_tokens
    if p.logit_bias:
        options["sequence_bias"] = [[[k], v] for k, v in p.logit_bias.items()]
    ids = torch.tensor([request.prompt])
    entry = request.adapter.split("+") if request.adapter else "__base__"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(p.seed + index)
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=[entry], **options)
    return made[0, ids.shape[1] :].tolist()


def some_params(rng: random.Random, most: int = 12) -> SamplingParams:
    """Greedy, or drawn in some way."""
    new = rng.randint(1, most)
    if rng.random() < 0.5:
        return SamplingParams(max_new_tokens=new, ignore_end=rng.random() < 0.5)
    return SamplingParams(
        max_new_tokens=new, temperature=rng.choice([0.6, 1.0, 1.7]), top_k=rng.choice([0, 9]), top_p=rng.choice([1.0, 0.8]),
        min_p=rng.choice([0.0, 0.05]), repetition_penalty=rng.choice([1.0, 1.3]), seed=rng.randrange(10**6),
        min_new_tokens=rng.choice([0, min(new, 3)]), logit_bias=rng.choice([{}, {7: 2.0, 9: -3.0}]),
    )  # fmt: skip


def some_prompt(rng: random.Random, most: int = 20, starts: list[list[int]] | None = None) -> tuple[int, ...]:
    start = rng.choice(starts) if starts and rng.random() < 0.6 else []
    return (*start, *(rng.randrange(3, VOCAB) for _ in range(rng.randint(1, most))))
