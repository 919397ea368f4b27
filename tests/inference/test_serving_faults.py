"""What can go wrong: nobody waits for ever, and nobody else is touched."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from engine_helpers import Names, alone, crowd, engine_of, run, some_params, some_prompt
from helpers import fresh

import graftlm
from graftlm.errors import ConfigError, GraftError, QueueFullError, RequestError, ServingError, UnsupportedError
from graftlm.inference.engine import Engine, EngineConfig
from graftlm.inference.handle import Handle
from graftlm.inference.requests import Request, SamplingParams


@cache
def model() -> Any:
    return crowd("llama", ["lora", "prompt", "prefix"])


def asked(new: int = 6, prompt: tuple[int, ...] = (5, 6, 7), adapter: str = "", **options: Any) -> Request:
    params = SamplingParams(max_new_tokens=new, ignore_end=True)
    return Request(prompt=prompt, adapter=adapter, params=params, **options)


def clean(engine: Engine) -> None:
    space = engine.scheduler.space
    assert space.free == space.capacity and not engine._jobs and not engine.stepping.writings
    assert not engine.scheduler.busy and engine._waiting == engine._waiting_tokens == 0
    assert all(not v.users for v in engine.registry.names.values())


# -- ends before their time ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("n", [1, 3])
def test_cancelled(steps: int, n: int) -> None:
    """Before it began, in its prompt, in the midst of writing: it is gone with the next step, others go on."""
    engine = engine_of(model(), step_tokens=8)
    other = engine.submit(asked(12, adapter="lora"))
    handle = engine.submit(asked(50, prompt=tuple(range(5, 25)), n=n))
    for _ in range(steps):
        engine.work()
    handle.cancel()
    engine.work()
    assert handle.done and [c.finish for c in handle.result().completions] == ["cancelled"] * n
    handle.cancel()
    run(engine)
    assert list(other.result().completions[0].tokens) == alone(model(), asked(12, adapter="lora"))
    clean(engine)


@pytest.mark.parametrize("adapter", ["", "lora"])
def test_an_errand_whose_asker_left(adapter: str) -> None:
    """Nobody waits for its vectors; the engine goes on."""
    engine = engine_of(model())
    left, stays = (engine.embed(adapter, [[5, 6, 7]]) for _ in range(2))
    assert left.cancel()
    handle = engine.submit(asked())
    run(engine)
    assert len(stays.result()[0]) == model().base.config.hidden_size
    assert list(handle.result().completions[0].tokens) == alone(model(), asked())
    clean(engine)


def test_cancelled_while_its_adapter_is_on_its_way(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr("graftlm.inference.registry.read", lambda path: gate.wait(30))
    engine = engine_of(model())
    engine.registry.add("slow", tmp_path)
    handle = engine.submit(asked(adapter="slow"))
    engine.work()
    handle.cancel()
    engine.work()
    assert handle.result().completions[0].finish == "cancelled"
    gate.set()
    clean(engine)


@pytest.mark.parametrize("n", [1, 2])
def test_deadlines(n: int) -> None:
    """In the queue and in the batch; a clock that jumps ends them at once, and one that stands still never."""
    now = [100.0]
    engine = Engine(model(), Names(), EngineConfig(max_rows=1, prepack=False), clock=lambda: now[0])
    running = engine.submit(asked(60, timeout=50.0, n=n))
    waiting = engine.submit(asked(60, timeout=10.0, n=n))
    last = engine.submit(asked(4, timeout=10**6))
    for _ in range(4):
        engine.work()
    now[0] += 20
    engine.work()
    assert waiting.done and not running.done
    now[0] += 10**4
    run(engine)
    assert [c.finish for c in running.result().completions] == ["timeout"] * n
    assert len(running.result().completions) == n
    assert waiting.result().usage.completion_tokens == 0
    assert list(last.result().completions[0].tokens) == alone(model(), asked(4))
    clean(engine)


# -- refused -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (asked(prompt=()), RequestError, "An empty prompt"),
        (asked(prompt=(5, 96)), RequestError, r"Token ids \[96\]: expected 0 to 95"),
        (asked(prompt=("a",)), RequestError, r"Token ids \['a'\]"),  # type: ignore[arg-type]
        (asked(n=0), RequestError, "n=0: expected 1 to 16"),
        (asked(100, prompt=(5,) * 29), RequestError, "29 tokens and max_new_tokens=100 are 129 together.*room for 128"),
        (Request(prompt=(5,), params=SamplingParams(logit_bias={96: 1.0})), RequestError, "Token ids"),
    ],
)
def test_requests_that_cannot_be_served(request_: Request, error: Any, message: str) -> None:
    engine = engine_of(model())
    with pytest.raises(error, match=message):
        engine.submit(request_)
    clean(engine)


def test_a_front_takes_room_too() -> None:
    engine = engine_of(model())
    handle = engine.submit(asked(100, prompt=(5,) * 26, adapter="prefix"))
    run(engine)
    with pytest.raises(RequestError, match="26 tokens, 5 places of 'prefix'.*131 together"):
        handle.result()
    clean(engine)


def test_a_full_queue() -> None:
    engine = engine_of(model(), max_rows=1, max_waiting=3, max_waiting_tokens=20)
    handles = [engine.submit(asked()) for _ in range(3)]
    with pytest.raises(QueueFullError, match="3 requests wait"):
        engine.submit(asked())
    for _ in range(3):
        engine.work()
    handles += [engine.submit(asked(prompt=tuple(range(5, 19))))]
    with pytest.raises(QueueFullError, match="prompts of 20 tokens"):
        engine.submit(asked(prompt=(5,)))
    run(engine)
    assert all(h.result() for h in handles)
    clean(engine)


def test_texts_need_a_tokenizer() -> None:
    engine = Engine(model(), None, EngineConfig(prepack=False))
    with pytest.raises(UnsupportedError, match="to have a tokenizer"):
        engine.submit(Request(prompt=(5,), params=SamplingParams(stop=("a",))))
    handle = engine.submit(asked())
    run(engine)
    assert list(handle.result().completions[0].tokens) == alone(model(), asked())


@pytest.mark.parametrize("options", [{"max_rows": 0}, {"cache_tokens": 5}, {"max_adapters": 0}])
def test_sizes_out_of_range(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        EngineConfig(**options)


def test_a_base_without_steps() -> None:
    wrapped = graftlm.get_peft_model(fresh("t5"), graftlm.LoraConfig(task_type="SEQ_2_SEQ_LM"))
    with pytest.raises(UnsupportedError, match="through generate"):
        Engine(wrapped)


def test_a_form_that_cannot_be_read_fails_its_request_only() -> None:
    pytest.importorskip("llguidance")
    engine = engine_of(model())
    other = engine.submit(asked())
    with pytest.raises(UnsupportedError, match="tokenizers library"):  # before the engine hears of it
        engine.submit(Request(prompt=(5,), params=SamplingParams(response_format={"type": "json_object"})))
    run(engine)
    assert list(other.result().completions[0].tokens) == alone(model(), asked())
    clean(engine)


# -- failures ------------------------------------------------------------------------------------------------------------
def test_a_step_that_fails_costs_only_the_rows_that_fail_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(model())
    engine.stepping.composition(())
    step = engine.served.step

    def failing(rows: Any, attention: Any) -> Any:
        if any(66 in list(row.tokens) for row in rows):
            raise RuntimeError("out of luck")
        return step(rows, attention)

    monkeypatch.setattr(engine.served, "step", failing)
    handles = [engine.submit(asked(prompt=prompt)) for prompt in ((5, 6), (66, 6), (7, 8, 9))]
    run(engine)
    with pytest.raises(ServingError, match="A step of the model failed: RuntimeError\\('out of luck'\\)"):
        handles[1].result()
    for handle, prompt in ((handles[0], (5, 6)), (handles[2], (7, 8, 9))):
        assert list(handle.result().completions[0].tokens) == alone(model(), asked(prompt=prompt))
    clean(engine)


def test_a_dead_engine_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(model()).start()
    engine.submit(asked()).result()
    assert engine.health().alive and engine.health().error is None

    def dying(now: float) -> Any:
        raise SystemError("the loop broke")

    monkeypatch.setattr(engine.scheduler, "schedule", dying)
    handles = [engine.submit(asked()) for _ in range(2)]
    for handle in handles:
        with pytest.raises(ServingError, match="the loop broke|does not run"):
            handle.result()
    with pytest.raises(ServingError, match="does not run: SystemError"):
        engine.submit(asked())
    health = engine.health()
    assert not health.alive and "the loop broke" in str(health.error)
    engine.close()


def test_a_handle_notices_an_engine_that_is_gone_without_a_word() -> None:
    handle = Handle(asked(), lambda h: None, lambda: False)
    handle.PATIENCE = 0.01  # type: ignore[misc]
    with pytest.raises(ServingError, match="does not run any more"):
        handle.result()
    handle = Handle(asked(), lambda h: None, lambda: False)
    handle.PATIENCE = 0.01  # type: ignore[misc]
    with pytest.raises(ServingError, match="does not run any more"):
        asyncio.run(handle.aresult())


def test_closing() -> None:
    engine = engine_of(model()).start()
    handles = [engine.submit(asked(10)) for _ in range(5)]
    engine.close(drain=True)
    assert all(len(h.result().completions[0].tokens) == 10 for h in handles)
    with pytest.raises(ServingError, match="does not run"):
        engine.submit(asked())
    engine = engine_of(model()).start()
    handles = [engine.submit(asked(100)) for _ in range(5)]
    engine.close()
    for handle in handles:
        with pytest.raises(ServingError, match="was stopped"):
            handle.result()


# -- threads and asyncio -------------------------------------------------------------------------------------------------
def test_asyncio() -> None:
    """Streams of many requests in one event loop, some of which are given up in the middle."""

    async def ask(engine: Engine, i: int) -> None:
        request = asked(8 + i % 5, adapter=("", "lora", "prompt+lora")[i % 3])
        handle = engine.submit(request)
        seen: list[int] = []
        async for event in handle:
            seen += event.tokens
            if i % 4 == 3 and len(seen) == 2:
                handle.cancel()
        wanted = alone(model(), request)
        assert seen == wanted[: len(seen)] and (len(seen) == len(wanted) or i % 4 == 3)

    async def everyone(engine: Engine) -> None:
        await asyncio.gather(*(ask(engine, i) for i in range(16)))

    with engine_of(model()) as engine:
        asyncio.run(everyone(engine))
    clean(engine)


def test_threads() -> None:
    """Requests of all sorts from many threads: each gets its own answer."""

    def ask(engine: Engine, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(6):
            adapter = rng.choice(["", "lora", "prompt", "prefix", "lora+prefix"])
            request = Request(prompt=some_prompt(rng), adapter=adapter, params=some_params(rng), n=rng.choice([1, 1, 2]))
            made = [list(c.tokens) for c in engine.submit(request).result().completions]
            asks.append((request, made))

    asks: list[tuple[Request, list[list[int]]]] = []
    with engine_of(model(), cache_tokens=256, max_rows=6) as engine:
        threads = [threading.Thread(target=ask, args=(engine, i)) for i in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert len(asks) == 30
    for request, made in asks:
        assert made == [alone(model(), request, i) for i in range(request.n)]
    clean(engine)


def test_an_idle_engine_sleeps_and_wakes() -> None:
    with engine_of(model()) as engine:
        engine.submit(asked()).result()
        calls: list[int] = []
        work: Callable[[], bool] = engine.work
        engine.work = lambda: calls.append(1) or work()  # type: ignore[method-assign]
        time.sleep(0.3)
        assert len(calls) <= 2
        start = time.monotonic()
        engine.submit(asked(1)).result()
        assert time.monotonic() - start < 0.9


def test_fuzzed_requests() -> None:
    """Anything at all: an answer or an error of ours for each, and nothing left behind."""
    rng = random.Random(0)
    engine = engine_of(model(), cache_tokens=256, max_rows=5, max_waiting=50)
    handles: list[Handle] = []
    refused = 0
    for _ in range(150):
        try:
            params = SamplingParams(
                max_new_tokens=rng.choice([1, 5, 30, 500]), temperature=rng.choice([0.0, 1.0, 100.0]),
                top_p=rng.choice([1.0, 1e-9]), top_k=rng.choice([0, 1, 10**6]), stop=rng.choice([(), ("下",), ("不存在",)]),
                logit_bias=rng.choice([{}, {5: 1e30}, dict.fromkeys(range(96), -1e+38)]), seed=rng.choice([0, 2**63 - 1]),
                logprobs=rng.choice([None, 0, 100]),
            )  # fmt: skip
            prompt = some_prompt(rng, rng.choice([3, 60])) if rng.random() < 0.9 else (rng.randrange(-5, 200),)
            adapter = rng.choice(["", "lora", "prompt", "nothing", "lora+prompt", "lora+lora", "+"])
            timeout = rng.choice([None, None, 0.0, 60.0])
            handles.append(
                engine.submit(
                    Request(prompt=prompt, adapter=adapter, params=params, n=rng.choice([1, 2, 5]), timeout=timeout)
                )
            )
        except GraftError:
            refused += 1
        if rng.random() < 0.2 and handles:
            rng.choice(handles).cancel()
        for _ in range(rng.randrange(3)):
            engine.work()
    run(engine)
    assert refused > 10 and len(handles) > 40
    ended = 0
    for handle in handles:
        assert handle.done
        try:
            ended += all(c.finish for c in handle.result().completions)
        except GraftError:
            ended += 1
    assert ended == len(handles)
    clean(engine)
    assert torch.isfinite(torch.cat([t.flatten() for pair in engine.stepping.cache.layers.values() for t in pair])).all()
