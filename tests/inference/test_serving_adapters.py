"""Adapters that come and go while others are served: versions, room, broken directories."""

from __future__ import annotations

import shutil
import threading
import time
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import alone, crowd, engine_of, run
from helpers import fresh, randomise

import graftlm
from graftlm.errors import AdapterError, BaseMismatchError, CheckpointError, GraftError, UnknownAdapterError
from graftlm.inference import registry, stepping
from graftlm.inference.requests import Request, SamplingParams
from graftlm.inference.threads import begin

PARAMS = SamplingParams(max_new_tokens=6, ignore_end=True)
KINDS: dict[str, Any] = {
    "lora": lambda: graftlm.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "v_proj"]),
    "prompt": lambda: graftlm.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": lambda: graftlm.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "houlsby": lambda: graftlm.BottleneckConfig(task_type="CAUSAL_LM", placement="houlsby", reduction_factor=4),
}


def saved(folder: Path, kind: str = "lora", seed: int = 0) -> Path:
    """An adapter's directory."""
    model = randomise(graftlm.get_peft_model(fresh("llama"), KINDS[kind]()), seed, 0.3)
    model.save_pretrained(folder)
    return folder


def request(adapter: str = "", **options: Any) -> Request:
    return Request(prompt=(5, 6, 7, 8), adapter=adapter, params=PARAMS, **options)


def written_by(path: Path | None) -> tuple[int, ...]:
    """What the adapter of a directory writes by itself."""
    if path is None:
        model = crowd("llama", ["lora"])
        return tuple(alone(model, request()))
    model = graftlm.PeftModel.from_pretrained(fresh("llama"), path)
    return tuple(alone(model, request("default")))


def settled(engine: Any, future: Any) -> Any:
    """What a load comes to."""
    until = time.monotonic() + 30
    while not future.done():
        assert time.monotonic() < until
        engine.work()
        time.sleep(0.001)
    return future.result()


def finished(engine: Any, *handles: Any) -> list[tuple[int, ...]]:
    until = time.monotonic() + 60
    while not all(h.done for h in handles):
        assert time.monotonic() < until, "stuck"
        if not engine.work():
            time.sleep(0.001)
    return [h.result().completions[0].tokens for h in handles]


@pytest.fixture
def served() -> Any:
    made = []

    def start(**config: Any) -> Any:
        made.append(engine_of(crowd("llama", ["lora"]), **config))
        return made[-1]

    with torch.no_grad():
        yield start
    for engine in made:
        engine.close()


def test_kinds_from_directories(served: Any, tmp_path: Path) -> None:
    """Loaded at their first request, at once, and composed."""
    engine = served()
    paths = {kind: saved(tmp_path / kind, kind, i) for i, kind in enumerate(KINDS)}
    for kind, path in paths.items():
        engine.registry.add(f"my/{kind}.v1", path)
    assert all(v.state is registry.State.COLD for v in engine.registry.names.values() if v.path)
    handles = [engine.submit(request(f"my/{kind}.v1")) for kind in paths]
    both = engine.submit(request("my/lora.v1+my/prompt.v1"))
    made = finished(engine, *handles, both)
    assert made[:-1] == [written_by(path) for path in paths.values()] and len(set(made)) == len(made)
    model = graftlm.PeftModel.from_pretrained(fresh("llama"), paths["lora"], "l")
    model.load_adapter(paths["prompt"], "p")
    assert made[-1] == tuple(alone(model, request("l+p")))


def test_replaced_under_its_name_while_it_writes(served: Any, tmp_path: Path) -> None:
    """Requests that run finish on the old one; those that come later get the new one, and nothing of the old one's cache."""
    engine = served()
    old, new = saved(tmp_path / "old", seed=1), saved(tmp_path / "new", seed=2)
    settled(engine, engine.load("style", old))
    before = engine.submit(request("style"))
    engine.work()
    future = engine.load("style", new)
    settled(engine, future)
    assert not before.done or before._events
    after = engine.submit(request("style"))
    assert finished(engine, before, after) == [written_by(old), written_by(new)]
    again = engine.submit(request("style"))
    assert finished(engine, again) == [written_by(new)]
    assert [v.path for v in engine.registry.live] == [new]  # the old one is gone
    assert len(engine.model.methods) == 2
    saved(old, seed=3)  # another content in the same directory
    settled(engine, engine.load("style", old))
    third = engine.submit(request("style"))
    assert finished(engine, third) == [written_by(old)]


def test_the_same_content_under_two_names_shares_its_starts(served: Any, tmp_path: Path) -> None:
    engine = served()
    path = saved(tmp_path / "a")
    for name in ("a", "b"):
        settled(engine, engine.load(name, path))
    first = engine.submit(request("a"))
    finished(engine, first)
    second = engine.submit(request("b"))
    until = time.monotonic() + 30
    while not second.done and time.monotonic() < until:
        engine.work()
    assert second.result().usage.cached_tokens == 3


def test_compositions_beyond_those_kept_ready(served: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every order of names is one: those used longest ago go, with their fronts, and come back as they were."""
    monkeypatch.setattr(stepping, "READY", 4)
    engine = served()
    for kind in ("prompt", "prefix", "houlsby"):
        engine.registry.add(kind, saved(tmp_path / kind, kind))
    orders = ["+".join(names) for n in (1, 2, 3) for names in permutations(("prompt", "prefix", "houlsby"), n)]
    made = [finished(engine, engine.submit(request(order)))[0] for order in orders]
    assert len(engine.stepping.compositions) <= 4 and len(engine.starts.fronts) <= 4
    together = [engine.submit(request(order)) for order in orders]  # none goes that a request goes through
    assert finished(engine, *together) == made


def test_starts_of_detached_adapters_are_bounded(served: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepping, "READY", 2)
    engine = served(max_adapters=2)
    for i in range(6):
        engine.registry.add(f"a{i}", saved(tmp_path / f"a{i}", "prefix", i))
        finished(engine, engine.submit(request(f"a{i}")))
    assert len(engine.starts.fronts) <= 5  # of live ones, and of two that were detached
    again = engine.submit(request("a4"))
    for _ in range(10_000):
        if again.done:
            break
        engine.work()
    assert again.result().usage.cached_tokens == 3


def test_unloaded_while_it_writes(served: Any, tmp_path: Path) -> None:
    engine = served()
    path = saved(tmp_path / "a")
    settled(engine, engine.load("a", path))
    handle = engine.submit(request("a"))
    engine.work()
    engine.unload("a")
    with pytest.raises(UnknownAdapterError, match="no adapter 'a'; served: 'lora'"):
        engine.submit(request("a"))
    assert finished(engine, handle) == [written_by(path)]
    engine.work()
    assert not engine.registry.live and list(engine.model.methods) == ["lora"]
    with pytest.raises(AdapterError, match="cannot be unloaded"):
        engine.unload("lora")


def test_more_adapters_than_room(served: Any, tmp_path: Path) -> None:
    """All are served in turn; those used last stay, and a pinned one."""
    engine = served(max_adapters=2)
    paths = {f"a{i}": saved(tmp_path / f"a{i}", list(KINDS)[i % 4], i) for i in range(5)}
    wanted = {name: written_by(path) for name, path in paths.items()}
    for name, path in paths.items():
        engine.registry.add(name, path)
    order = [f"a{i}" for i in (0, 1, 2, 3, 4, 0, 0, 3, 1, 4, 2, 2)]
    handles = [engine.submit(request(name)) for name in order]
    assert finished(engine, *handles) == [wanted[name] for name in order]
    assert len(engine.registry.live) <= 2
    engine.registry.pin("a2")
    for name in ("a2", "a1", "a3", "a4"):
        handle = engine.submit(request(name))
        finished(engine, handle)
    assert {v.name for v in engine.registry.live} == {"a2", "a4"}
    three = engine.submit(request("a0+a1"))
    with pytest.raises(AdapterError, match="max_adapters"):
        finished(engine, three)
    engine.registry.pin("a2", False)
    pair = engine.submit(request("a0+a1"))
    finished(engine, pair)


def test_a_stream_of_requests_on_one_adapter_does_not_keep_others_out(served: Any, tmp_path: Path) -> None:
    engine = served(max_adapters=1)
    for i in range(2):
        engine.registry.add(f"a{i}", saved(tmp_path / f"a{i}", seed=i))
    first = [engine.submit(request("a0"))]
    other, steps = None, 0
    while other is None or not other.done:
        first.append(engine.submit(request("a0")))
        engine.work()
        time.sleep(0.002)
        steps += 1
        if steps == 3:
            other = engine.submit(request("a1"))
        assert steps < 300, "kept out"
    assert finished(engine, other) == [written_by(tmp_path / "a1")]
    finished(engine, *first)


@pytest.mark.parametrize("fault", ["missing", "empty", "cut off", "no config", "deleted later", "other base", "pickle"])
def test_a_broken_directory_fails_its_own_requests_only(served: Any, tmp_path: Path, fault: str) -> None:
    engine, path = served(), tmp_path / "broken"
    if fault == "other base":
        randomise(graftlm.get_peft_model(fresh("llama", seed=9), KINDS["lora"]())).save_pretrained(path)
    elif fault != "missing":
        saved(path)
    weights = path / "adapter_model.safetensors"
    if fault == "empty":
        shutil.rmtree(path)
        path.mkdir()
    elif fault == "cut off":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif fault == "no config":
        (path / "adapter_config.json").unlink()
    elif fault == "pickle":
        weights.unlink()
        torch.save({}, path / "adapter_model.bin")
    engine.registry.add("broken", path)
    beside = engine.submit(request("lora"))
    engine.work()
    if fault == "deleted later":
        settled(engine, engine.load("broken", path))
        finished(engine, engine.submit(request("broken")))
        version = engine.registry.names["broken"]
        engine.registry.detach(version)
        shutil.rmtree(path)
    handle = engine.submit(request("broken"))
    error = BaseMismatchError if fault == "other base" else CheckpointError
    with pytest.raises(error):
        finished(engine, handle)
    assert finished(engine, beside) == [tuple(alone(engine.model, request("lora")))]
    with pytest.raises(error):
        settled(engine, engine.load("broken", path))
    assert list(engine.model.methods) == ["lora"]
    shutil.rmtree(path, ignore_errors=True)
    saved(path)  # mended
    mended = engine.submit(request("broken"))
    assert finished(engine, mended) == [written_by(path)]


def test_a_directory_that_fails_at_once(served: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reading that is over before the engine looks again is not taken for an adapter that is there."""
    engine = served()

    def at_once(what: Any, name: str) -> None:
        begin(what, name).join(0.2)  # over, or waiting for the registry's lock

    monkeypatch.setattr("graftlm.inference.registry.begin", at_once)
    engine.registry.add("gone", tmp_path / "nowhere")
    handle = engine.submit(request("gone"))
    with pytest.raises(CheckpointError, match="not a directory"):
        finished(engine, handle)
    assert finished(engine, engine.submit(request("lora"))) == [tuple(alone(engine.model, request("lora")))]


def test_a_failed_replacement_leaves_the_old_one(served: Any, tmp_path: Path) -> None:
    engine, path = served(), saved(tmp_path / "a")
    settled(engine, engine.load("a", path))
    with pytest.raises(CheckpointError):
        settled(engine, engine.load("a", tmp_path / "nowhere"))
    handle = engine.submit(request("a"))
    assert finished(engine, handle) == [written_by(path)]


def test_a_slow_directory_holds_nobody_else_back(served: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = served()
    gate, read = threading.Event(), registry.read

    def slowly(path: Path) -> None:
        if path.name == "slow":
            assert gate.wait(30)
        read(path)

    monkeypatch.setattr(registry, "read", slowly)
    engine.registry.add("slow", saved(tmp_path / "slow"))
    engine.registry.add("fast", saved(tmp_path / "fast", "prompt"))
    slow, fast, base = (engine.submit(request(name)) for name in ("slow", "fast", ""))
    assert finished(engine, fast, base) == [written_by(tmp_path / "fast"), written_by(None)]
    assert not slow.done and not slow._events
    gate.set()
    assert finished(engine, slow) == [written_by(tmp_path / "slow")]


def spoil(model: Any, name: str) -> None:
    with torch.no_grad():
        for _, parameter in model.adapter_parameters(name):
            parameter.fill_(float("nan"))


@pytest.mark.parametrize("tried", [True, False])
def test_an_adapter_of_no_numbers_spoils_nothing(served: Any, tried: bool) -> None:
    """Its requests fail; those beside it and those that come to its places later do not."""
    model = crowd("llama", ["lora"])
    for kind, config in KINDS.items():
        for name in (f"good_{kind}", f"bad_{kind}"):
            model.add_adapter(name, config())
        spoil(model, f"bad_{kind}")
    engine = engine_of(model, cache_tokens=64, step_tokens=3, kept_tokens=0)
    wanted = tuple(alone(model, request("lora")))
    for kind in KINDS:
        if tried:  # else it shows before the first step
            engine.submit(request(f"good_{kind}"))
            run(engine)
        handles = [engine.submit(request(name)) for name in (f"bad_{kind}", "lora", "lora")]
        run(engine)
        with pytest.raises(GraftError, match="no finite numbers"):
            handles[0].result()
        assert [h.result().completions[0].tokens for h in handles[1:]] == [wanted] * 2
    later = [engine.submit(request("lora")) for _ in range(3)]
    run(engine)
    assert all(h.result().completions[0].tokens == wanted for h in later)


def test_swaps_under_load(tmp_path: Path) -> None:
    """Names change what they stand for while threads ask: every answer is of one version or the other, whole."""
    paths = [saved(tmp_path / str(i), list(KINDS)[i], i) for i in range(4)]
    wanted = {written_by(path) for path in paths}
    engine = engine_of(crowd("llama", ["lora"]), max_adapters=3).start()
    engine.load("a", paths[0]).result(60)
    found: list[tuple[int, ...]] = []
    failed: list[Exception] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            try:
                found.append(engine.submit(request("a")).result().completions[0].tokens)
            except Exception as error:
                failed.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(24):
        engine.load("a", paths[i % 4]).result(60)
    stop.set()
    for thread in threads:
        thread.join(60)
    engine.close(drain=True)
    assert not failed and len(found) > 10
    assert set(found) <= wanted and len(set(found)) > 1
    assert len(engine.model.methods) <= 1 + 3


def test_names(served: Any, tmp_path: Path) -> None:
    engine = served()
    with pytest.raises(AdapterError, match="without '\\+'"):
        engine.load("a+b", tmp_path)
    with pytest.raises(AdapterError, match="was attached to the model itself"):
        engine.load("lora", tmp_path)
    with pytest.raises(AdapterError, match="already"):
        engine.registry.add("lora", tmp_path)
    with pytest.raises(AdapterError, match="twice"):
        engine.submit(request("lora+lora"))
    with pytest.raises(UnknownAdapterError, match="did you mean 'lora'"):
        engine.submit(request("lorra"))
