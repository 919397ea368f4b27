"""Random traces: requests join and leave, rows are preempted, adapters are loaded, replaced, evicted and unloaded; each
request writes what it writes alone, under an adapter that its name stood for since it came."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import alone, crowd, engine_of, everything, some_params, some_prompt
from helpers import fresh, randomise

import graftlm
from graftlm.errors import UnknownAdapterError
from graftlm.inference.requests import Request

FAMILIES = ("llama", "bloom", "gpt2", "opt", "qwen3", "gemma3", "glm", "chatglm")
KINDS = ("lora", "dora", "ia3", "loha", "prompt", "p_mlp", "prefix", "houlsby", "parallel")
STARTS = [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 40, 41]]


def saved(name: str, root: Path, kinds: tuple[str, ...]) -> dict[str, Path]:
    """Two adapters of each kind in folders."""
    made = {}
    for i, kind in enumerate((*kinds, *kinds)):
        model = graftlm.get_peft_model(fresh(name), everything(name)[kind])
        model.set_requires_grad(["default"], True)
        randomise(model, 10 + i)
        made[f"{kind}-{i}"] = root / f"{kind}-{i}"
        model.save_pretrained(made[f"{kind}-{i}"])
    return made


def seeded(name: str) -> Any:
    """The model with two adapters of its own, the same at each call."""
    torch.manual_seed(0)
    return crowd(name, ["lora", "prompt"])


class Trace:
    """An engine, what its names stand for, and what was asked of it."""

    def __init__(self, name: str, root: Path, seed: int, kinds: tuple[str, ...]) -> None:
        self.rng = random.Random(seed)
        self.paths = saved(name, root, kinds)
        self.model = seeded(name)
        self.engine = engine_of(self.model, max_adapters=3, cache_tokens=192, max_rows=5, kept_tokens=60, step_tokens=7)
        self.stands: dict[str, str] = {}  # for which folder
        self.asked: list[tuple[Request, Any, list[set[str]]]] = []  # with all that each of its names stood for since
        self.began: dict[Any, list[str]] = {}  # of which folders the request is, when it begins
        begin = self.engine.stepping.begin

        def noted(job: Any) -> None:
            self.began[job.handle] = [v.name if v.path is None else v.path.name for v in job.versions]
            begin(job)

        self.engine.stepping.begin = noted  # type: ignore[method-assign]
        self.left: set[Any] = set()
        for folder in self.rng.sample(list(self.paths), 4):
            name = f"a{len(self.stands)}"
            self.engine.registry.add(name, self.paths[folder])
            self.stands[name] = folder

    def ask(self) -> None:
        rng = self.rng
        names = rng.sample([*self.stands, "lora", "prompt"], rng.choice([1, 1, 1, 2]))
        names = [] if rng.random() < 0.15 else names
        request = Request(
            prompt=some_prompt(rng, starts=STARTS),
            adapter="+".join(names),
            params=some_params(rng, 24),
            n=rng.choice([1, 1, 2]),
        )
        handle = self.engine.submit(request)
        self.asked.append((request, handle, [{self.stands.get(n, n)} for n in names]))
        if rng.random() < 0.15:
            handle.cancel()
            self.left.add(handle)

    def swap(self) -> None:
        """A name that stands for another folder once that is live; or for none, and then for one again."""
        name, folder = self.rng.choice(list(self.stands)), self.rng.choice(list(self.paths))
        for request, handle, stood in self.asked:
            for own, folders in zip(request.adapter.split("+"), stood, strict=False):
                if own == name and handle not in self.began:
                    folders.add(folder)
        if self.rng.random() < 0.3:
            self.engine.unload(name)
            with pytest.raises(UnknownAdapterError):
                self.engine.submit(Request(prompt=(5,), adapter=name))
            self.engine.registry.add(name, self.paths[folder])
        else:
            done, until = self.engine.load(name, self.paths[folder]), time.monotonic() + 120
            while not done.done():
                assert time.monotonic() < until
                self.work()
            done.result()
        self.stands[name] = folder

    def work(self) -> None:
        if not self.engine.work():
            time.sleep(0.001)

    def check(self, name: str) -> int:
        """All of it compared; how many completions that were."""
        until = time.monotonic() + 300
        while self.engine._jobs:
            assert time.monotonic() < until, "stuck"
            self.work()
        reference, compared = seeded(name), 0
        for folder, path in self.paths.items():
            reference.load_adapter(path, folder)
            reference.load_adapter(path, f"{folder}-again")  # two names may stand for it, in one composition
        for request, handle, stood in self.asked:
            folders = self.began.get(handle, [])  # none: it was given up before
            assert all(own in known for own, known in zip(folders, stood, strict=bool(folders)))
            for i, made in enumerate(handle.result().completions if folders or not stood else ()):
                folders = [f + "-again" * (f in folders[:at]) for at, f in enumerate(folders)]
                again = Request(prompt=request.prompt, adapter="+".join(folders), params=request.params)
                wanted = alone(reference, again, i)
                assert list(made.tokens) == (wanted[: len(made.tokens)] if handle in self.left else wanted), again
                compared += bool(made.tokens)
        return compared


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "llama" else [pytest.mark.slow]) for n in FAMILIES])
def test_random_traces(name: str, seed: int, tmp_path: Path) -> None:
    kinds = KINDS[seed::2] if name != "llama" or not seed else KINDS
    with torch.no_grad():
        trace = Trace(name, tmp_path, seed, kinds)
        for i in range(36):
            trace.ask()
            if i % 4 == 3:
                trace.swap()
            for _ in range(trace.rng.choice([0, 1, 3])):
                trace.work()
        assert trace.check(name) > 25
    engine = trace.engine
    assert engine.registry.counts["evicted"] > 0 and len(engine.registry.live) <= 3
    space = engine.scheduler.space
    assert space.free == space.capacity and not engine.stepping.writings
    engine.close()
