"""A fleet of replicas over a clock: the router and the scheduler that serve, with the seconds that steps took.

    python benchmarks/fleet.py --measure costs.json    # the seconds of steps on this machine (one core), smollm2
    python benchmarks/fleet.py --costs costs.json      # 1,000 replicas, 100,000 adapters, 1 M requests, three policies
    python benchmarks/fleet.py --costs costs.json --replicas 20 --adapters 2000 --requests 20000

What is simulated is time alone: which replica gets a request, what goes into a step, who waits, which adapter is put out and
read again is decided by `graftlm.fleet.router`, `graftlm.inference.scheduler` and `pace` themselves. A step of d rows that
decode and p tokens of prompts, of g compositions, takes step + row·d + token·p + group·g seconds; attaching an adapter
holds the replica's steps back for `load` seconds. Steps in which the same rows decode, until one ends or a request comes,
are gone over at once: nothing is decided in them. `benchmarks/serving_ray.py --validate` compares this with two real
replicas.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import random
import statistics
import time
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from graftlm.errors import QueueFullError
from graftlm.fleet.remote import START
from graftlm.fleet.router import POLICIES, Ask, Place, Router
from graftlm.inference.pace import Pace
from graftlm.inference.scheduler import Piece, Scheduler, Sequence
from graftlm.inference.space import Space


@dataclass(frozen=True)
class Costs:
    """Seconds of a step, and of attaching an adapter."""

    step: float
    row: float
    token: float
    group: float
    load: float

    def of(self, decoding: int, prompts: int, groups: int) -> float:
        """A step of so many rows that decode, tokens of prompts, and compositions."""
        return self.step + self.row * decoding + self.token * prompts + self.group * groups


@dataclass(frozen=True)
class Limits:
    """Of a replica, as in a fleet's configuration."""

    rows: int = 16
    room: int = 16
    most: int = 272
    cache_tokens: int = 16384
    step_tokens: int = 256


@dataclass(frozen=True)
class Wanted:
    """A request: when it comes, of whom, and how long it and its answer are."""

    at: float
    adapter: str
    prompt: int
    new: int


@dataclass(eq=False, kw_only=True)
class Job(Sequence):
    """A request that is on its way."""

    wanted: Wanted
    ask: Ask
    first: float = 0.0
    hit: bool = True

    @property
    def left(self) -> int:
        """Tokens that it has yet to write."""
        return self.prompt + self.wanted.new - len(self.tokens)


class Node:
    """A replica over the clock."""

    def __init__(self, name: str, limits: Limits, costs: Costs) -> None:
        self.name, self.limits, self.costs = name, limits, costs
        self.pace = Pace(limits.step_tokens)
        space = Space(limits.cache_tokens)
        self.scheduler = Scheduler(space, limits.rows, limits.step_tokens, chunk=self.pace.tokens)
        self.pending: deque[Job] = deque()
        self.held: dict[str, int] = {}  # requests of each adapter that is attached; used last at the end
        self.pieces: list[Piece] = []
        self.decoding = self.prompts = 0  # rows and tokens of these
        self.steps = 0  # that go on now, all alike
        self.each = self.begun = 0.0  # seconds of one of these, and when the first begins
        self.turn = 0  # counts the ends that were foretold: the last one counts
        self.runs = False
        self.loads = 0
        self.busy = 0.0

    def admit(self) -> float:
        """Let in whose adapters are there, or find room; the seconds that attaching takes."""
        seconds, waits = 0.0, deque[Job]()
        for job in self.pending:
            adapter = job.wanted.adapter
            if adapter and adapter not in self.held:
                job.hit = False
                idle = next((a for a, users in self.held.items() if not users), None)
                if waits or (len(self.held) >= self.limits.room and idle is None):
                    waits.append(job)
                    continue
                if len(self.held) >= self.limits.room:
                    del self.held[str(idle)]
                self.loads += 1
                seconds += self.costs.load
                self.held[adapter] = 0
            if adapter:
                self.held[adapter] = self.held.pop(adapter) + 1
            self.scheduler.add(job)
        self.pending = waits
        return seconds

    def step(self, now: float) -> float | None:
        """Begin a step, or several that are alike; when they end. None: there is nothing to do."""
        seconds = self.admit() if self.pending else 0.0
        self.busy += seconds
        self.runs = self.scheduler.busy
        if not self.runs:
            return None
        self.pieces = pieces = self.scheduler.schedule().pieces
        prompts = [p.count for p in pieces if p.sequence.filling]
        self.decoding, self.prompts = len(pieces) - len(prompts), sum(prompts)
        self.each = self.costs.of(self.decoding, self.prompts, len({p.sequence.group for p in pieces}))
        self.begun, self.steps = now + seconds, 1
        if not self.scheduler.turns and not self.pending:
            self.steps = min([job_of(p).left for p in pieces])
        return self.end

    @property
    def end(self) -> float:
        self.turn += 1
        return self.begun + self.steps * self.each

    def cut(self, now: float) -> float:
        """A request comes: the step that runs is the last of those that are alike; when it ends."""
        self.steps = min(self.steps, max(1, math.ceil((now - self.begun) / self.each)))
        return self.end

    def over(self, now: float) -> list[Job]:
        """What ran has ended: tokens are written; the requests that are done."""
        for _ in range(self.steps):
            self.pace.took(self.decoding, self.prompts, self.each)
        self.busy += self.steps * self.each
        written = [job_of(p) for p in self.pieces if not p.sequence.filling or p.completes]
        self.scheduler.ran(self.pieces)
        done = []
        for job in written:
            job.tokens += [0] * self.steps
            job.done += self.steps - 1
            job.first = job.first or now
            if not job.left:
                self.scheduler.remove(job)
                if job.wanted.adapter:
                    self.held[job.wanted.adapter] -= 1
                done.append(job)
        return done


def job_of(piece: Piece) -> Job:
    return piece.sequence  # type: ignore[return-value]


@dataclass
class Found:
    """What came out."""

    policy: str
    requests: int = 0
    refused: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first: array = field(default_factory=lambda: array("d"))
    whole: array = field(default_factory=lambda: array("d"))
    slowdown: dict[str, list[float]] = field(default_factory=dict)  # by adapter: its number and the sum of seconds a token
    hits: int = 0
    loads: int = 0
    busy: list[float] = field(default_factory=list)

    def add(self, job: Job, now: float) -> None:
        wanted = job.wanted
        self.requests += 1
        self.tokens += wanted.new
        self.hits += job.hit
        self.seconds = now
        self.first.append(job.first - wanted.at)
        self.whole.append(now - wanted.at)
        sums = self.slowdown.setdefault(wanted.adapter, [0, 0.0])
        sums[0] += 1
        sums[1] += (now - wanted.at) / wanted.new

    def figures(self) -> dict[str, Any]:
        """The table's line."""
        means = [total / count for count, total in self.slowdown.values()]
        first, whole = sorted(self.first), sorted(self.whole)
        mean = statistics.fmean(self.busy)
        return {
            "policy": self.policy, "requests": self.requests, "refused": self.refused,
            "tokens_per_s": self.tokens / self.seconds, "seconds": self.seconds,
            "hits": self.hits / max(self.requests, 1), "loads": self.loads,
            "first_p50": quantile(first, 0.5), "first_p99": quantile(first, 0.99),
            "whole_p50": quantile(whole, 0.5), "whole_p99": quantile(whole, 0.99),
            "busiest": max(self.busy) / mean if mean else 0.0, "busy": mean / self.seconds,
            "fairness": jain(means),
        }  # fmt: skip


def quantile(ordered: list[float], part: float) -> float:
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0


def jain(values: list[float]) -> float:
    """Jain's index: 1 where all have the same, 1/n where one has all."""
    squares = sum(v * v for v in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


class Fleet:
    """Replicas behind a router, over a clock."""

    def __init__(self, count: int, limits: Limits, costs: Costs, policy: str) -> None:
        self.router = Router(policy)
        names = [f"r{i}" for i in range(count)]
        self.router.update(Place(name=n, rows=limits.rows, room=limits.room, most=limits.most) for n in names)
        self.nodes = {name: Node(name, limits, costs) for name in names}
        self.found = Found(policy)
        self.events: list[tuple[float, int, int, Node]] = []
        self.numbers, self.starts = itertools.count(), itertools.count()

    def run(self, wanted: Iterable[Wanted]) -> Found:
        """All of these, in the order of their times."""
        for request in wanted:
            self._until(request.at)
            self._arrive(request)
        self._until(float("inf"))
        self.found.loads = sum(node.loads for node in self.nodes.values())
        self.found.busy = [node.busy for node in self.nodes.values()]
        return self.found

    def _arrive(self, wanted: Wanted) -> None:
        adapters = (wanted.adapter,) if wanted.adapter else ()
        own = next(self.starts) if wanted.prompt > START else None  # no two prompts begin alike
        ask = Ask(adapters=adapters, key=own, tokens=wanted.prompt + wanted.new)
        try:
            node = self.nodes[self.router.choose(ask)]
        except QueueFullError:
            self.found.refused += 1
            return
        node.pending.append(Job(tokens=[0] * wanted.prompt, group=wanted.adapter, wanted=wanted, ask=ask))
        if not node.runs:
            self._begin(node, wanted.at)
        elif node.steps > 1:
            self._ends(node, node.cut(wanted.at))

    def _begin(self, node: Node, now: float) -> None:
        loads = node.loads
        self._ends(node, node.step(now))
        if node.loads != loads:
            self.router.holds(node.name, node.held)

    def _ends(self, node: Node, at: float | None) -> None:
        if at is not None:
            heapq.heappush(self.events, (at, next(self.numbers), node.turn, node))

    def _until(self, at: float) -> None:
        while self.events and self.events[0][0] <= at:
            now, _, turn, node = heapq.heappop(self.events)
            if turn != node.turn:
                continue
            for job in node.over(now):
                self.router.finished(node.name, job.ask)
                self.found.add(job, now)
            self._begin(node, now)


def zipf(
    requests: int, adapters: int, rate: float, exponent: float = 1.0, prompts: tuple[int, int] = (10, 200),
    new: tuple[int, int] = (10, 120), seed: int = 0,
) -> Iterator[Wanted]:  # fmt: skip
    """Requests at random times, their adapters by Zipf's law.

    Args:
        rate: requests a second.
        prompts, new: least and most tokens.
    """
    rng = random.Random(seed)
    weights = list(itertools.accumulate(1 / (i + 1) ** exponent for i in range(adapters)))
    names, at = [f"a{i}" for i in range(adapters)], 0.0
    for _ in range(requests):
        at += rng.expovariate(rate)
        adapter = rng.choices(names, cum_weights=weights)[0]
        yield Wanted(at, adapter, rng.randint(*prompts), rng.randint(*new))


def measured(base: str, adapters: int = 16) -> Costs:
    """The seconds of steps of a real engine on one core of this machine."""
    from serving_ray import fitted, sampled_steps

    return Costs(**asdict(fitted(*sampled_steps(base, adapters))))  # (one file may be imported under two names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--adapters", type=int, default=100_000)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--load", type=float, default=0.7, help="requests, as a share of what the replicas could serve")
    parser.add_argument("--exponent", type=float, default=1.0, help="of Zipf's law")
    parser.add_argument("--room", type=int, default=16, help="adapters that a replica holds")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--costs", type=Path, help="seconds of steps, as --measure wrote them")
    parser.add_argument("--measure", type=Path, help="measure them and leave")
    parser.add_argument("--base", default="smollm2", help="what is measured")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.measure:
        costs = measured(args.base)
        args.measure.write_text(json.dumps(asdict(costs)), encoding="utf-8")
        print(costs)
        return
    if args.costs is None:
        parser.error("how long steps take is to be said: --measure costs.json here first, then --costs costs.json")
    costs = Costs(**json.loads(args.costs.read_text()))
    limits, found = Limits(room=args.room), []
    # a full batch's seconds a request, its prompt included
    each = 65 * (costs.step / limits.rows + costs.row + costs.group) + 105 * costs.token
    rate = args.load * args.replicas / each
    for policy in args.policies:
        begun = time.process_time()
        fleet = Fleet(args.replicas, limits, costs, policy)
        line = fleet.run(zipf(args.requests, args.adapters, rate, args.exponent)).figures()
        line["cpu_seconds"] = time.process_time() - begun
        found.append(line)
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()), flush=True)
    print(f"requests a second {rate:.4g}, {costs}", Counter(line["policy"] for line in found).total(), "policies")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
