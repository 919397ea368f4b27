"""The engine: whoever joins and leaves, each request writes what `generate` writes for it alone."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch
from engine_helpers import alone, crowd, engine_of, run, some_params, some_prompt
from families import CAUSAL, VOCAB, build
from transformers import AutoModelForCausalLM, AutoTokenizer

import graftlm
from graftlm.bundled import base_path
from graftlm.inference.engine import Engine, EngineConfig
from graftlm.inference.requests import Request, SamplingParams

STEPPED = [name for name in CAUSAL if name != "falcon"]
QUICK = ("llama", "bloom", "gpt2", "gemma3", "chatglm")  # the others are the long tail
STARTS = [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 40, 41], [20, 21, 22, 23]]


def adapters_of(model: Any) -> list[str]:
    names = list(model.methods)
    return [
        "",
        *names,
        *(["lora+prompt", "prefix+wide+prompt"] if {"lora", "prompt", "prefix", "wide"} <= set(names) else []),
    ]


def trace(model: Any, seed: int, count: int, most: int = 12, **config: Any) -> Any:
    """Random requests that come while others run; all of them compared."""
    rng, engine = random.Random(seed), engine_of(model, **config)
    names, requests, handles = adapters_of(model), [], []
    preempted = 0
    schedule = engine.scheduler.schedule

    def noted(now: float = 0.0) -> Any:
        nonlocal preempted
        step = schedule(now)
        preempted += len(step.preempted)
        return step

    engine.scheduler.schedule = noted  # type: ignore[method-assign]
    for i in range(count):
        name = names[i % len(names)] if i < len(names) else rng.choice(names)
        request = Request(prompt=some_prompt(rng, starts=STARTS), adapter=name, params=some_params(rng, most))
        requests.append(request)
        handles.append(engine.submit(request))
        for _ in range(rng.choice([0, 0, 1, 3])):
            engine.work()
    run(engine)
    for request, handle in zip(requests, handles, strict=True):
        result = handle.result()
        assert list(result.completions[0].tokens) == alone(model, request), (request.adapter, request.params)
        assert result.usage.completion_tokens == len(result.completions[0].tokens)
    space = engine.scheduler.space
    assert space.free == space.capacity and not engine._jobs and not engine.stepping.writings
    assert engine._waiting == engine._waiting_tokens == 0
    return engine, preempted


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in STEPPED])
def test_each_request_equals_itself_alone(name: str) -> None:
    """All methods and compositions on every family."""
    engine, _ = trace(crowd(name), 0, 24)
    assert engine.starts.tokens


@pytest.mark.parametrize("name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("bloom", "gemma3", "gpt2"))])
def test_each_request_equals_itself_alone_when_the_cache_is_full(name: str) -> None:
    """Rows give way and are computed anew in the middle of what they write."""
    base = build("gemma3", sliding_window=6) if name == "gemma3" else None
    model = crowd(name, ["lora", "wide", "prompt", "prefix", "houlsby"], base=base)
    _, preempted = trace(model, 1, 24, most=40, cache_tokens=160, max_rows=6, kept_tokens=0)
    assert preempted > 2


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_small_steps_and_few_rows(seed: int) -> None:
    model = crowd("llama", ["lora", "wide", "dora", "prompt", "prefix"])
    trace(model, seed, 30, step_tokens=3, max_rows=2, kept_tokens=30)


def test_several_completions_of_a_prompt() -> None:
    model = crowd("llama", ["lora", "prompt"])
    engine = engine_of(model)
    engine.stepping.composition(engine.registry.resolve("lora+prompt"))  # tried out
    params = SamplingParams(max_new_tokens=9, temperature=1.2, seed=11, ignore_end=True)
    request = Request(prompt=tuple(range(5, 25)), adapter="lora+prompt", params=params, n=4)
    handle = engine.submit(request)
    passes: list[int] = []
    step = engine.served.step
    engine.served.step = lambda rows, attention: passes.append(sum(len(r.tokens) for r in rows)) or step(rows, attention)  # type: ignore[method-assign]
    run(engine)
    result = handle.result()
    made = [list(c.tokens) for c in result.completions]
    assert made == [alone(model, request, i) for i in range(4)] and len(set(map(tuple, made))) == 4
    assert sum(passes) == 20 + 3 + 4 * 8  # the prompt once, its last token once more for each of the others
    assert (result.usage.prompt_tokens, result.usage.completion_tokens, result.usage.cached_tokens) == (20, 36, 0)


def test_shared_starts_are_computed_once() -> None:
    model = crowd("llama", ["lora", "prompt"])
    engine = engine_of(model)
    head = tuple(range(5, 45))
    for adapter, cached in [("lora", 0), ("lora", 40), ("prompt", 0), ("", 0), ("prompt", 40), ("lora", 40)]:
        request = Request(prompt=(*head, 50 + cached, 51), adapter=adapter, params=SamplingParams(max_new_tokens=4))
        handle = engine.submit(request)
        run(engine)
        result = handle.result()
        assert result.usage.cached_tokens in (cached, cached and 41)
        assert list(result.completions[0].tokens) == alone(model, request)
    earlier = engine.submit(Request(prompt=head, params=SamplingParams(max_new_tokens=20, ignore_end=True)))
    run(engine)
    written = earlier.result().completions[0].tokens
    follow = Request(prompt=(*head, *written, 70, 71), params=SamplingParams(max_new_tokens=4))
    later = engine.submit(follow)
    run(engine)
    result = later.result()
    assert result.usage.cached_tokens == 40 + 19  # an earlier turn, but for its last token, which nobody has run
    assert list(result.completions[0].tokens) == alone(model, follow)


def test_texts_stops_and_log_probabilities() -> None:
    model = crowd("llama", ["lora"])
    engine = engine_of(model)
    free = Request(prompt=(5, 6, 7), adapter="lora", params=SamplingParams(max_new_tokens=12, ignore_end=True, logprobs=3))
    handle = engine.submit(free)
    run(engine)
    whole = handle.result().completions[0]
    assert whole.finish == "length" and len(whole.text) == len([t for t in whole.tokens if t > 2])
    ids = torch.tensor([[5, 6, 7, *whole.tokens]])
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=["lora"]).logits[0].log_softmax(-1)
    for i, found in enumerate(whole.logprobs):
        assert found.logprob == pytest.approx(float(wanted[2 + i, whole.tokens[i]]), abs=1e-4)
        assert len(found.top) == 3 and found.token == whole.tokens[i]
    stop = whole.text[4:6]
    at = whole.text.index(stop)
    handle = engine.submit(
        Request(prompt=(5, 6, 7), adapter="lora", params=SamplingParams(max_new_tokens=12, ignore_end=True, stop=(stop,)))
    )
    run(engine)
    cut = handle.result().completions[0]
    assert (cut.text, cut.finish) == (whole.text[:at], "stop")
    token = whole.tokens[3]
    handle = engine.submit(
        Request(
            prompt=(5, 6, 7), adapter="lora", params=SamplingParams(max_new_tokens=12, ignore_end=True, stop_ids=(token,))
        )
    )
    run(engine)
    ended = handle.result().completions[0]
    assert ended.finish == "stop" and ended.tokens == whole.tokens[: whole.tokens.index(token) + 1]
    assert ended.text == whole.text[: len(ended.tokens) - 1]


def test_events_come_one_a_token() -> None:
    engine = engine_of(crowd("gpt2", ["lora"]))
    handle = engine.submit(Request(prompt=(5, 6), params=SamplingParams(max_new_tokens=5, ignore_end=True)))
    run(engine)
    events = list(handle)
    assert [e.finish for e in events] == [None] * 4 + ["length"]
    assert [e.usage is not None for e in events] == [False] * 4 + [True]
    assert all(len(e.tokens) == 1 for e in events) and max(t for e in events for t in e.tokens) < VOCAB


def test_forms_through_the_engine() -> None:
    """On the bundled base, beside a free request, which writes what it writes alone; stop ids of one are not another's."""
    pytest.importorskip("llguidance")
    base = AutoModelForCausalLM.from_pretrained(base_path(), dtype="float32")
    names = AutoTokenizer.from_pretrained(base_path())
    model = graftlm.get_peft_model(base, graftlm.LoraConfig(task_type="CAUSAL_LM"), "lora").eval()
    engine = Engine(model, names, EngineConfig(prepack=False))
    prompt = tuple(names("The answer is")["input_ids"])
    stop = names("7", add_special_tokens=False)["input_ids"][-1]
    form = {"type": "regex", "pattern": "[0-9]{3}-[a-c]{2}"}
    asked = [
        Request(
            prompt=prompt,
            params=SamplingParams(max_new_tokens=20, response_format=form, stop_ids=stops, seed=i, temperature=t),
        )
        for i, (stops, t) in enumerate([((stop,), 0.0), ((), 0.0), ((), 1.0)])
    ]
    free = Request(prompt=prompt, adapter="lora", params=SamplingParams(max_new_tokens=8))
    handles = [engine.submit(request) for request in (*asked, free)]
    run(engine)
    for handle in handles[1:3]:
        made = handle.result().completions[0]
        assert re.fullmatch(form["pattern"], made.text) and made.finish == "stop"
    ids = torch.tensor([prompt])
    wanted = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    got = handles[3].result().completions[0]
    assert list(got.tokens) == wanted[0, len(prompt) :].tolist()
    assert got.text == names.decode(got.tokens, skip_special_tokens=True)
