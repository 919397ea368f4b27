"""Bases that cannot be stepped, in batches through `generate`: each request writes what it writes alone."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch
from engine_helpers import Names, alone, everything, run, some_params, some_prompt
from families import build
from helpers import fresh, randomise

import graftlm
from graftlm.errors import GraftError, RequestError, ServingError, UnsupportedError
from graftlm.inference.batches import BatchEngine
from graftlm.inference.engine import Engine, EngineConfig
from graftlm.inference.requests import Request, SamplingParams

SEQ2SEQ = ("t5", "bart")
ROPE = {"dynamic": {"rope_type": "dynamic", "factor": 5.0, "rope_theta": 10000.0}}


def model_of(name: str) -> Any:
    """A base that cannot be stepped, with adapters of several kinds."""
    base = build("llama", rope_parameters=ROPE[name], max_position_embeddings=16) if name in ROPE else fresh(name)
    kinds = everything("llama" if name in ROPE else name)
    if name in SEQ2SEQ:
        for config in kinds.values():
            config.task_type = "SEQ_2_SEQ_LM"
    chosen = {k: kinds[k] for k in ("lora", "wide", "ia3", "prompt", "prefix", "houlsby")}
    first, *others = chosen
    model = graftlm.get_peft_model(base, chosen[first], first)
    for key in others:
        model.add_adapter(key, chosen[key])
    model.set_requires_grad(list(model.methods), True)
    randomise(model)
    return model.eval()


def engine_of(model: Any, **config: Any) -> BatchEngine:
    return BatchEngine(model, Names(), EngineConfig(**{"prepack": False} | config))


def wanted(model: Any, request: Request, index: int = 0) -> list[int]:
    """Of `generate` alone: a decoder of its own starts with a token that is no part of what it writes."""
    if not model.config.is_encoder_decoder:
        return alone(model, request, index)
    p = request.params
    ids = torch.tensor([request.prompt])
    options: dict[str, Any] = {"max_new_tokens": p.max_new_tokens, "do_sample": p.temperature > 0}
    if p.temperature > 0:
        options |= {"temperature": p.temperature, "top_p": p.top_p, "top_k": p.top_k, "min_p": p.min_p or None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(p.seed + index)
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, repetition_penalty=p.repetition_penalty,
            adapter_names=[request.adapter.split("+") if request.adapter else "__base__"],
            eos_token_id=97 if p.ignore_end else [2, 0],
            sequence_bias=[[[k], v] for k, v in p.logit_bias.items()] or None,
            min_new_tokens=p.min_new_tokens or None, **options,
        )  # fmt: skip
    return made[0, 1:].tolist()


def clean(engine: Engine) -> None:
    assert not engine._jobs and not engine.stepping.writings and not engine.scheduler.busy
    assert engine._waiting == engine._waiting_tokens == 0
    assert all(not v.users for v in engine.registry.names.values())


@pytest.mark.parametrize("name", ["falcon", "t5", "bart", "dynamic"])
def test_each_request_equals_itself_alone(name: str) -> None:
    model, rng = model_of(name), random.Random(3)
    engine = engine_of(model, max_rows=4)
    names = ["", *model.methods, *([] if name in SEQ2SEQ else ["lora+prompt"])]
    requests, handles = [], []
    for i in range(16):
        n = rng.choice([1, 1, 3])
        requests.append(Request(prompt=some_prompt(rng), adapter=names[i % len(names)], params=some_params(rng), n=n))
        handles.append(engine.submit(requests[-1]))
        if rng.random() < 0.3:
            with torch.no_grad():
                engine.work()
    run(engine)
    for request, handle in zip(requests, handles, strict=True):
        for i, made in enumerate(handle.result().completions):
            assert list(made.tokens) == wanted(model, request, i), (request.adapter, request.params)
    clean(engine)


def asked(new: int = 6, prompt: tuple[int, ...] = (5, 6, 7), adapter: str = "", **options: Any) -> Request:
    return Request(prompt=prompt, adapter=adapter, params=SamplingParams(max_new_tokens=new, ignore_end=True), **options)


def during(engine: BatchEngine, step: int = 0, what: Any = None) -> list[int]:
    """Do something before the tokens of a step are chosen; how many rows each step has."""
    write, seen = engine.stepping.write, []

    def noted(rows: Any, logits: Any) -> Any:
        seen.append(len(rows))
        if len(seen) == step:
            what()
        return write(rows, logits)

    engine.stepping.write = noted  # type: ignore[method-assign]
    return seen


def test_a_batch_holds_requests_of_all_adapters() -> None:
    model = model_of("falcon")
    engine = engine_of(model, max_rows=4)
    steps = during(engine)
    handles = [
        engine.submit(asked(adapter=name, prompt=(5, 6, 7)[: 1 + i % 3])) for i, name in enumerate(["", *model.methods])
    ]
    run(engine)
    assert steps == [4] * 6 + [3] * 6
    assert [len(h.result().completions[0].tokens) for h in handles] == [6] * 7
    clean(engine)


def test_rows_whose_positions_depend_on_the_longest_one_go_by_request() -> None:
    engine = engine_of(model_of("dynamic"), max_rows=8)
    steps = during(engine)
    handles = [engine.submit(asked(n=2)), engine.submit(asked(2))]
    run(engine)
    assert steps == [2] * 6 + [1] * 2 and all(h.done for h in handles)


def test_cancelled_and_out_of_time_in_the_midst() -> None:
    """A row that nobody wants goes at once; those beside it go on; what comes meanwhile is heard."""
    model, now = model_of("falcon"), [100.0]
    engine = BatchEngine(model, Names(), EngineConfig(prepack=False), clock=lambda: now[0])
    slow, late = engine.submit(asked(30)), engine.submit(asked(30, adapter="lora", timeout=10.0))
    other, new = engine.submit(asked(12, adapter="prompt")), []

    def happen() -> None:
        slow.cancel()
        now[0] += 20
        new.append(engine.submit(asked(3)))
        new.append(engine.submit(asked(3, timeout=0.5)))

    steps = during(engine, 4, happen)
    with torch.no_grad():
        engine.work()
    ended = [h.result().completions[0] for h in (slow, late)]
    assert [(c.finish, len(c.tokens)) for c in ended] == [("cancelled", 3), ("timeout", 3)]
    assert list(other.result().completions[0].tokens) == alone(model, asked(12, adapter="prompt"))
    assert len(steps) == 12  # not thirty
    now[0] += 0.6
    run(engine)
    assert list(new[0].result().completions[0].tokens) == alone(model, asked(3))
    assert new[1].result().completions[0].finish == "timeout"
    clean(engine)


def test_what_fails_costs_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("falcon")
    model.add_adapter("bad", graftlm.LoraConfig(task_type="CAUSAL_LM"))
    with torch.no_grad():
        for _, parameter in model.adapter_parameters("bad"):
            parameter.fill_(float("nan"))
    engine = engine_of(model)
    bad, good = engine.submit(asked(adapter="bad")), engine.submit(asked(adapter="lora"))
    run(engine)
    with pytest.raises(GraftError, match="no finite numbers"):
        bad.result()
    assert list(good.result().completions[0].tokens) == alone(model, asked(adapter="lora"))
    generate = type(model).generate

    def failing(self: Any, input_ids: Any, **options: Any) -> Any:
        if 66 in input_ids:
            raise RuntimeError("out of luck")
        return generate(self, input_ids=input_ids, **options)

    monkeypatch.setattr(type(model), "generate", failing)
    handles = [engine.submit(asked(prompt=prompt)) for prompt in ((5, 6), (66, 6), (7, 8, 9))]
    run(engine)
    with pytest.raises(ServingError, match="A batch of the model failed: RuntimeError"):
        handles[1].result()
    monkeypatch.undo()
    for handle, prompt in ((handles[0], (5, 6)), (handles[2], (7, 8, 9))):
        assert list(handle.result().completions[0].tokens) == alone(model, asked(prompt=prompt))
    write = engine.stepping.write

    def broken(rows: Any, logits: Any) -> Any:
        if engine.stepping.writings[rows[0]].count == 2:
            raise RuntimeError("in the midst")
        return write(rows, logits)

    engine.stepping.write = broken  # type: ignore[method-assign]
    handles = [engine.submit(asked()) for _ in range(2)]
    run(engine)
    for handle in handles:
        with pytest.raises(ServingError, match="in the midst"):
            handle.result()
    clean(engine)


def test_closing_in_the_midst() -> None:
    """At once, with an error for each, though the batch is long."""
    engine = engine_of(model_of("falcon"))
    begun = threading.Event()
    steps = during(engine, 3, begun.set)
    engine.start()
    handles = [engine.submit(asked(100)) for _ in range(3)]
    assert begun.wait(60)
    engine.close()
    for handle in handles:
        with pytest.raises(ServingError, match="was stopped"):
            handle.result()
    assert len(steps) < 60


def test_lengths() -> None:
    """A prompt that an encoder reads takes nothing of what may be written; a front does."""
    engine = engine_of(model_of("bart"))
    assert engine.limit == 128
    handle = engine.submit(asked(100, prompt=(5,) * 100))
    run(engine)
    assert len(handle.result().completions[0].tokens) == 100
    for wrong in (asked(1, prompt=(5,) * 129), asked(129)):
        with pytest.raises(RequestError, match="room for 128"):
            engine.submit(wrong)


def test_a_base_that_writes_nothing() -> None:
    wrapped = graftlm.get_peft_model(fresh("bert"), graftlm.LoraConfig(task_type="SEQ_CLS"))
    with pytest.raises(UnsupportedError, match="writes no text"):
        BatchEngine(wrapped)
