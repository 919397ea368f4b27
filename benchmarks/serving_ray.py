"""Real replicas on a Ray cluster of this machine.

python benchmarks/serving_ray.py                     # prints a table; minutes
python benchmarks/serving_ray.py --only hits --quick

two       two replicas of one thread against one of two, eight adapters (rank 8), as `serving.py --only trace` asks
hits      64 adapters by Zipf's law, eight replicas with room for eight: found where they were sent, by affinity, which
          begins with none attached, then at random by the same replicas
ingress   a request of one token: over HTTP through Serve, ingress and replica, less the same at the replica
validate  two replicas' tokens a second and requests' seconds on one trace, against the simulation's (`fleet.py`) with steps
          timed on those before and behind it
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import fleet as simulated

import graftlm
from graftlm.cluster import connected
from graftlm.fleet.catalogue import Catalogue
from graftlm.fleet.config import FleetConfig
from graftlm.fleet.remote import Remote
from graftlm.fleet.replica import Replica
from graftlm.inference.requests import Request, SamplingParams


class Watched(Replica):
    """A replica that notes its steps."""

    def _load(self) -> Any:
        facts = super()._load()
        self.steps = watch(self.engine)
        return facts

    async def timed(self) -> list[tuple[int, int, int, float]]:
        """Steps so far (rows that decode, tokens of prompts, compositions, seconds), and forget them."""
        found, self.steps[:] = list(self.steps), []
        return found


def watch(engine: Any) -> list[tuple[int, int, int, float]]:
    """A list that every step of an engine is noted in."""
    steps: list[tuple[int, int, int, float]] = []
    sizes: list[tuple[int, int, int]] = []
    forward, work = engine.stepping._forward, engine.work

    def noted(pieces: Any, *rest: Any) -> Any:
        prompts = sum(p.count for p in pieces if p.sequence.filling)
        decoding = sum(not p.sequence.filling for p in pieces)
        sizes.append((decoding, prompts, len({p.sequence.group for p in pieces})))
        return forward(pieces, *rest)

    def timed() -> bool:
        begun = time.perf_counter()
        busy = work()
        if sizes:
            steps.append((*sizes.pop(), time.perf_counter() - begun))
            sizes.clear()
        return bool(busy)

    engine.stepping._forward, engine.work = noted, timed
    return steps


def adapters(base: str, count: int, folder: Path) -> Catalogue:
    """LoRA adapters of a base, on disk and sealed."""
    from graftlm.training.bases import resolve_base

    model, _ = resolve_base(base)
    config = graftlm.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear", init_lora_weights=False)
    wrapped = graftlm.get_peft_model(model, config, "a0")
    catalogue = Catalogue(base)
    for i in range(count):
        if i:
            wrapped.add_adapter(f"a{i}", config)
        wrapped.save_pretrained(folder / f"save{i}", selected_adapters=[f"a{i}"])
        wrapped.delete_adapter(f"a{i}") if i else None
        saved = next((folder / f"save{i}").rglob("adapter_config.json")).parent
        catalogue.put(catalogue.read(f"a{i}", str(saved), False))
    return catalogue


class Direct:
    """Replicas behind a router of this process: no HTTP."""

    def __init__(self, ray: Any, config: FleetConfig, catalogue: Catalogue) -> None:
        self.ray, self.config, self.catalogue = ray, config, catalogue
        self.remote: Any = None

    async def __aenter__(self) -> Direct:
        r = self.config.replica
        kind = self.ray.remote(Watched).options(num_cpus=r.threads, max_concurrency=10_000)
        self.actors = [kind.remote(self.config.model_dump()) for _ in range(self.config.replicas.min)]
        self.facts = [await actor.facts.remote() for actor in self.actors]
        self.route("affinity")
        return self

    def route(self, policy: str) -> None:
        """Choose replicas by a policy from now on."""
        if self.remote is not None:
            self.remote.close()
        limits = self.config.replica.limits | {"most": 10_000, "most_tokens": 1 << 30}
        self.remote = Remote(limits, entries=self.entries, policy=policy)
        self.remote.update({f"r{i}": (actor, True) for i, actor in enumerate(self.actors)})

    async def loads(self) -> int:
        """Adapters that were attached so far."""
        return sum([(await actor.report.remote()).loads for actor in self.actors])

    async def __aexit__(self, *_: Any) -> None:
        self.remote.close()
        for actor in self.actors:
            self.ray.kill(actor)

    async def entries(self, adapter: str) -> list[Any]:
        return [self.catalogue.named(name) for name in adapter.split("+") if name]

    async def run(self, wanted: list[simulated.Wanted], streams: bool = True) -> tuple[float, float]:
        """All of these at their times; tokens a second, and the median of requests' seconds."""
        rng, vocabulary = random.Random(1), self.facts[0].vocabulary
        begun = time.perf_counter()

        async def one(w: simulated.Wanted) -> float:
            prompt = tuple(rng.randrange(10, vocabulary - 10) for _ in range(w.prompt))
            await asyncio.sleep(max(0.0, begun + w.at - time.perf_counter()))
            params = SamplingParams(max_new_tokens=w.new, ignore_end=True)
            await self.remote.submit(Request(prompt=prompt, adapter=w.adapter, params=params, streams=streams)).aresult()
            return time.perf_counter() - begun - w.at

        whole = await asyncio.gather(*(one(w) for w in wanted))
        return sum(w.new for w in wanted) / (time.perf_counter() - begun), statistics.median(whole)


def fitted(steps: list[tuple[int, int, int, float]], load: float = 0.0) -> simulated.Costs:
    """The seconds of steps, by least squares of errors relative to what is fitted (relative to what was measured, slow steps
    would count less than fast ones, and all come out too fast); in all they are what was measured."""
    import numpy as np

    sizes = np.array([[1.0, decoding, prompts, groups] for decoding, prompts, groups, _ in steps])
    seconds = np.array([s for *_, s in steps])
    said = np.full(len(steps), seconds.mean())
    for _ in range(5):
        found, *_ = np.linalg.lstsq(sizes / said[:, None], seconds / said, rcond=None)
        found = found.clip(min=0.0)
        said = sizes @ found
        found *= seconds.sum() / said.sum()
    return simulated.Costs(*map(float, found), load)


async def post(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, body: dict[str, Any]) -> bytes:
    """A request over an open connection, with next to nothing of a client's own."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
    length = next(int(line.partition(":")[2]) for line in lines if line.startswith("content-length:"))
    found = await reader.readexactly(length)
    if " 200 " not in status:
        raise RuntimeError(f"{status}: {found.decode()}")
    return found


class Bench:
    """The lines, one method each."""

    def __init__(self, ray: Any, args: argparse.Namespace, folder: Path) -> None:
        self.ray, self.args, self.folder = ray, args, folder
        self.found: list[dict[str, Any]] = []

    def say(self, work: str, **figures: Any) -> None:
        self.found.append({"work": work, **figures})
        print(f"{work:10} " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()))
        sys.stdout.flush()

    def config(self, replicas: int, threads: int, **replica: Any) -> FleetConfig:
        own = {"threads": threads, "prepack": False} | replica
        return FleetConfig.from_dict({"base": self.args.base, "replicas": replicas, "replica": own})

    def trace(self, seed: int) -> list[simulated.Wanted]:
        """Requests that come at once."""
        made = simulated.zipf(self.args.requests, 8, rate=1.0, seed=seed, new=(10, self.args.new))
        return [replace(w, at=0.0) for w in made]

    async def two(self) -> None:
        catalogue, speeds = adapters(self.args.base, 8, self.folder / "two"), {}
        for replicas, threads in ((1, 2), (2, 1)):
            async with Direct(self.ray, self.config(replicas, threads), catalogue) as fleet:
                await fleet.run(self.trace(0)[:8])
                speeds[replicas] = [(await fleet.run(self.trace(s)))[0] for s in range(1, 1 + self.args.rounds)]
        one, both = (statistics.median(s) for s in speeds.values())
        self.say("two", ratio=both / one, one_of_two_threads=one, two_of_one=both)

    async def hits(self) -> None:
        catalogue, figures = adapters("graftlm-base", 64, self.folder / "hits"), {}
        wanted = list(simulated.zipf(self.args.asked, 64, rate=self.args.rate, prompts=(8, 24), new=(4, 12)))
        config = self.config(8, 1, max_adapters=8).model_copy(update={"base": "graftlm-base"})
        async with Direct(self.ray, config, catalogue) as fleet:
            for policy in ("affinity", "random"):
                fleet.route(policy)
                before = await fleet.loads()
                speed, seconds = await fleet.run(wanted, streams=False)
                figures[policy] = 1 - (await fleet.loads() - before) / len(wanted)
                figures |= {f"{policy}_tokens_per_s": speed, f"{policy}_median_s": seconds}
        self.say("hits", **figures)

    async def ingress(self) -> None:
        from graftlm.fleet.start import bring_up

        with tempfile.TemporaryDirectory() as folder:
            catalogue = adapters("graftlm-base", 1, Path(folder))
            config = FleetConfig.from_dict(
                {"base": "graftlm-base", "adapters": {"a0": catalogue.named("a0").source}, "http": {"port": self.args.port}}
            )
            await asyncio.to_thread(bring_up, self.ray, config)
            direct, behind = [], []
            async with Direct(self.ray, config, catalogue) as fleet:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.args.port)
                body = {"model": "a0", "prompt": [11, 12, 13, 14], "max_tokens": 1, "ignore_eos": True}
                for _ in range(self.args.asked // 4):
                    begun = time.perf_counter()
                    await post(reader, writer, "/v1/completions", body)
                    behind.append(time.perf_counter() - begun)
                    begun = time.perf_counter()
                    await fleet.run([simulated.Wanted(0.0, "a0", 4, 1)], streams=False)
                    direct.append(time.perf_counter() - begun)
                writer.close()
        bare, through = statistics.median(direct), statistics.median(behind)
        self.say("ingress", added_ms=1000 * (through - bare), direct_ms=1000 * bare, http_ms=1000 * through)

    async def validate(self) -> None:
        catalogue = adapters(self.args.base, 8, self.folder / "validate")
        config = self.config(2, 1)
        real, steps = [], []
        async with Direct(self.ray, config, catalogue) as fleet:
            await fleet.run(self.trace(0)[:8])
            for actor in fleet.actors:
                await actor.timed.remote()
            for seed in range(self.args.rounds + 2):
                real.append(await fleet.run(self.trace(seed)))
                steps.append([step for actor in fleet.actors for step in await actor.timed.remote()])
        limits, said = simulated.Limits(rows=config.replica.max_rows, room=config.replica.max_adapters), []
        for seed in range(1, self.args.rounds + 1):
            costs = fitted(steps[seed - 1] + steps[seed + 1])
            found = simulated.Fleet(2, limits, costs, "affinity").run(self.trace(seed))
            said.append((found.tokens / found.seconds, statistics.median(found.whole)))
        figures: dict[str, float] = {}
        for i, name in enumerate(("tokens_per_s", "median_s")):
            there, here = (statistics.median(line[i] for line in lines) for lines in (real[1:-1], said))
            figures |= {name: there, f"{name}_simulated": here, f"{name}_ratio": here / there}
        self.say("validate", **figures, costs=str(costs))


def sampled_steps(base: str, count: int) -> tuple[list[tuple[int, int, int, float]], float]:
    """Steps of one engine in this process, and the seconds of attaching an adapter."""
    import torch

    from graftlm.inference.threads import apart
    from graftlm.serving.start import engine_for, without_adapters
    from graftlm.training.bases import resolve_base

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        catalogue = adapters(base, count, Path(folder))
        config = FleetConfig.from_dict({"base": base}).replica.engine(16)
        engine = apart(lambda: engine_for(without_adapters(resolve_base(base)[0]), None, config))
        steps, loads = watch(engine), []
        attach = engine.registry._attach

        def timed(version: Any) -> None:
            begun = time.perf_counter()
            attach(version)
            loads.append(time.perf_counter() - begun)

        engine.registry._attach = timed
        engine.start()
        rng = random.Random(0)
        handles = []
        for i in range(3 * count):
            name = f"a{i % count}"
            if name not in engine.registry.names:
                engine.registry.add(name, catalogue.named(name).folder)
            prompt = tuple(rng.randrange(10, 200) for _ in range(rng.randint(10, 100)))
            params = SamplingParams(max_new_tokens=rng.randint(5, 40), ignore_end=True)
            handles.append(engine.submit(Request(prompt=prompt, adapter=name, params=params)))
        for handle in handles:
            handle.result()
        engine.close()
        catalogue.close()
    return steps, statistics.median(loads)


LINES = ["two", "hits", "ingress", "validate"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2", help="of two and validate; the others take the bundled one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=32, help="of a trace")
    parser.add_argument("--new", type=int, default=120, help="tokens that a request of a trace writes at most")
    parser.add_argument("--asked", type=int, default=1200, help="requests of hits; a quarter of them of ingress")
    parser.add_argument("--rate", type=float, default=15.0, help="requests a second of hits")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--only", nargs="+", choices=LINES, default=LINES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="whether every line runs; its figures say nothing")
    args = parser.parse_args()
    if args.quick:
        args.base, args.rounds, args.requests, args.new, args.asked = "graftlm-base", 1, 9, 12, 80
    with tempfile.TemporaryDirectory() as folder, connected(None, cpus=16) as ray:
        bench = Bench(ray, args, Path(folder))
        for line in args.only:
            asyncio.run(getattr(bench, line)())
    if args.json:
        args.json.write_text(json.dumps(bench.found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
