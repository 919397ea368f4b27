"""Adapters that wait for their invocation (aLoRA): what is before it is the base's, and shared with it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from engine_helpers import alone, crowd, engine_of, run, some_params, some_prompt

import graftlm
from graftlm.errors import UnsupportedError
from graftlm.inference.requests import Request, SamplingParams

CALLS = {"intrinsic": [60, 61], "one": [62]}


def model_of(name: str) -> Any:
    model = crowd(name, ["lora", "prompt", "prefix"])
    for i, (adapter, call) in enumerate(CALLS.items()):
        target = model.methods["lora"].config.target_modules
        config = graftlm.LoraConfig(task_type="CAUSAL_LM", r=3 + i, target_modules=target, alora_invocation_tokens=call)
        model.add_adapter(adapter, config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for adapter in CALLS:
            for _, parameter in model.adapter_parameters(adapter):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def calling(rng: random.Random, adapter: str) -> tuple[int, ...]:
    """A prompt with no, one or several invocations anywhere."""
    call = CALLS["one" if "one" in adapter else "intrinsic"]
    parts = [list(some_prompt(rng, 9, [[5, 6, 7, 8, 9, 10, 11]])) for _ in range(3)]
    prompt = list(parts[0])
    for part in parts[1 : rng.choice([1, 2, 3])]:
        prompt += call + part
    return tuple(call + prompt if rng.random() < 0.1 else prompt)


@pytest.mark.parametrize("name", ["llama", "bloom", pytest.param("gemma3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("full", [False, True])
def test_each_request_equals_itself_alone(name: str, full: bool) -> None:
    """In chunks that an invocation parts, beside others, and computed anew in the midst of what is written."""
    model, rng = model_of(name), random.Random(1 + full)
    config: dict[str, Any] = {"cache_tokens": 160, "max_rows": 6, "kept_tokens": 0} if full else {"step_tokens": 5}
    engine = engine_of(model, **config)
    names = ["intrinsic", "one", "intrinsic+lora", "prompt+intrinsic", "prefix+one+lora", "", "lora"]
    asked, handles = [], []
    for i in range(28):
        adapter = names[i % len(names)]
        params = some_params(rng, 40 if full else 10)
        asked.append(Request(prompt=calling(rng, adapter), adapter=adapter, params=params, n=rng.choice([1, 1, 2])))
        handles.append(engine.submit(asked[-1]))
        for _ in range(rng.choice([0, 1, 3])):
            engine.work()
    run(engine)
    for request, handle in zip(asked, handles, strict=True):
        for i, made in enumerate(handle.result().completions):
            assert list(made.tokens) == alone(model, request, i), (request.adapter, request.prompt)


def test_the_start_is_shared_with_the_base() -> None:
    """By tokens before the invocation and none behind it, between adapters and the base."""
    engine = engine_of(model_of("llama"))
    head = tuple(range(5, 35))

    def cached(adapter: str, prompt: tuple[int, ...]) -> int:
        handle = engine.submit(Request(prompt=prompt, adapter=adapter, params=SamplingParams(max_new_tokens=4)))
        run(engine)
        result = handle.result()
        assert list(result.completions[0].tokens) == alone(engine.model, handle.request)
        return int(result.usage.cached_tokens)

    assert cached("intrinsic", (*head, 60, 61, 40, 41)) == 0
    assert cached("", (*head, 60, 61, 40, 41)) == 30  # the base goes on where the invocation stood
    assert cached("one", (*head, 62, 40)) == 30
    assert cached("intrinsic", (*head, 60, 61, 40, 41)) == 30
    assert cached("intrinsic", (*head, 60, 61, 40, 41, 60, 61, 42)) == 34  # a later one: what was adapted is the base's now
    assert cached("intrinsic", (*head, 50, 51)) == 30  # none: the base alone
    assert cached("lora", (*head, 50, 51)) == 0


def test_two_that_wait_are_not_composed() -> None:
    engine = engine_of(model_of("llama"))
    handle = engine.submit(Request(prompt=(5, 60, 61, 62), adapter="intrinsic+one", params=SamplingParams(max_new_tokens=4)))
    run(engine)
    with pytest.raises(UnsupportedError, match="not composed with each other"):
        handle.result()
