"""The engine's cache against the reference in plain tensors, and shared starts."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import close
from torch import Tensor

from graftlm.inference.cache import KeyValueCache, Span
from graftlm.inference.scheduler import Scheduler, Sequence
from graftlm.inference.space import Extent, Space
from graftlm.inference.starts import Starts
from graftlm.passes.served import FrontMemory, PlainCache

HEADS, SIZE, LAYERS = 4, 8, 2


def base(groups: int = 2, windows: list[int | None] | None = None, slopes: Tensor | None = None) -> Any:
    """What the caches ask of a served base."""
    host = SimpleNamespace(adapter_device=torch.device("cpu"))
    return SimpleNamespace(host=host, windows=windows or [None] * LAYERS, slopes=slopes, configs=[], groups=groups)


def front_of(served: Any, count: int, generator: torch.Generator) -> FrontMemory:
    drawn = [tuple(torch.randn(served.groups, count, SIZE, generator=generator) for _ in "kv") for _ in range(LAYERS)]
    return FrontMemory(drawn if count else [], count)  # type: ignore[arg-type]


BASES = {
    "plain": lambda: base(groups=4),
    "grouped": base,
    "one key head": lambda: base(groups=1),
    "windows": lambda: base(windows=[5, None]),
    "narrow windows": lambda: base(groups=1, windows=[1, 3]),
    "alibi": lambda: base(groups=4, slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625])),
    "alibi, grouped, in windows": lambda: base(windows=[None, 7], slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625])),
}


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_rows_equal_the_reference(kind: str, seed: int) -> None:
    """Random joins, chunks, growth, preemption and leaving; every layer's output is the reference's."""
    served, rng = BASES[kind](), random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    space = Space(512)
    cache, plain = KeyValueCache(served, space.capacity), PlainCache(served)
    cache.FIRST = cache.size = 32
    scheduler = Scheduler(space, max_rows=8, step_tokens=24)
    fronts = {group: front_of(served, count, generator) for group, count in enumerate((0, 3, 6))}
    kv: dict[Sequence, list] = {}  # of each token, so that what is computed again is the same
    steps = preempted = 0
    while steps < 120 or scheduler.busy:
        if steps < 120 and rng.random() < 0.4:
            group = rng.randrange(3)
            sequence = Sequence(tokens=[1] * rng.randint(1, 60), group=group, front=fronts[group].length)
            kv[sequence] = [
                [torch.randn(served.groups, 160, SIZE, generator=generator) for _ in "kv"] for _ in range(LAYERS)
            ]
            scheduler.add(sequence)
        step = scheduler.schedule()
        steps += 1
        preempted += len(step.preempted)
        for move in step.moves:
            cache.hold(move.target + move.count)
            cache.move(move.source, move.target, move.count)
        for row in step.preempted:
            plain.leave(row)
        for row in step.joined:
            cache.hold(row.extent.start + row.extent.size)
            cache.fill(row.extent.start, fronts[row.group].memory)
            plain.join(row, fronts[row.group])
        if not step.pieces:
            continue
        rng.shuffle(step.pieces)
        spans = [Span(p.sequence.extent, p.sequence.front + p.sequence.done, p.count) for p in step.pieces]
        fast, slow = cache.over(spans), plain.over([(p.sequence, p.count) for p in step.pieces])
        for layer in range(LAYERS):
            parts = [[t[:, p.sequence.done : p.sequence.done + p.count] for t in kv[p.sequence][layer]] for p in step.pieces]
            k, v = (torch.cat(side, dim=1) for side in zip(*parts, strict=True))
            q = torch.randn(HEADS, k.shape[1], SIZE, generator=generator)
            both = torch.cat((k, v)).transpose(0, 1) if layer else None
            close(fast.attend(q, k, v, layer, 0.3, both=both), slow.attend(q, k, v, layer, 0.3))
        scheduler.ran(step.pieces)
        for piece in step.pieces:
            row = piece.sequence
            if not row.pending:
                row.tokens.append(1)
                if len(row.tokens) - row.prompt > 40 or rng.random() < 0.03:
                    scheduler.remove(row)
                    plain.leave(row)
    assert steps > 120 and cache.size > 32
    assert preempted or seed


def test_extents_of_nobody_between_rows_change_nothing() -> None:
    """Rows on both sides of small gaps attend in one product, whatever lies there; a large gap parts them."""
    served, generator = base(), torch.Generator().manual_seed(0)
    cache, plain = KeyValueCache(served, 512), PlainCache(served)
    extents = [Extent(16 * at, 16) for at in (1, 3, 4, 7, 20)]
    spans = [Span(extent, filled, 1) for extent, filled in zip(extents, (4, 9, 1, 15, 6), strict=True)]
    cache.over(spans)
    cache.of(0, *(torch.zeros(2, 1, SIZE) for _ in "kv"))
    for kept in cache.layers[0]:
        kept.fill_(torch.nan)
    for span in spans:
        before = front_of(served, span.filled, generator)
        for kept in cache.layers[0]:
            kept[:, span.extent.start : span.extent.start + 16] = 0
        cache.fill(span.extent.start, before.memory[:1])
        plain.join(span, before)
    attention = cache.over(spans[::-1])
    assert [part.rows for part in attention.parts] == [7, 1]
    q, k, v = (torch.randn(heads, 5, SIZE, generator=generator) for heads in (HEADS, 2, 2))
    close(attention.attend(q, k, v, 0, 0.3), plain.over([(span, 1) for span in spans[::-1]]).attend(q, k, v, 0, 0.3))


def test_values_that_are_not_finite_stay_in_their_row() -> None:
    served = base()
    cache = KeyValueCache(served, 64)
    space = Space(64)
    first, second = space.take(10), space.take(10)
    bad = torch.full((2, 10, SIZE), torch.nan)
    good = torch.randn(2, 3, SIZE)
    for layer in range(LAYERS):
        cache.of(layer, bad, bad)
    cache.fill(first.start, [(bad, bad)] * LAYERS)
    cache.clear(first)
    q = torch.randn(HEADS, 2, SIZE)
    for extent in (first, second):
        cache.fill(extent.start, [(good, good)] * LAYERS)
    out = cache.over([Span(first, 3, 1), Span(second, 12, 1)]).attend(q, good[:, :2], good[:, :2], 0, 1.0)
    assert torch.isfinite(out).all()


# -- shared starts -------------------------------------------------------------------------------------------------------
def memory(tokens: list[int], before: list[int]) -> Any:
    """Keys and values that tell which tokens they are of, and what stood before."""
    made, state = [], hash(tuple(before))
    for token in tokens:
        state = hash((state, token))
        made.append(float(state % 1009))
    flat = torch.tensor(made)[None, :, None]
    return [(flat, flat + 0.5)] * LAYERS


def wanted(tokens: list[int]) -> list[float]:
    state, made = hash(()), []
    for token in tokens:
        state = hash((state, token))
        made.append(float(state % 1009))
    return made


@pytest.mark.parametrize("budget", [0, 40, 10_000])
def test_starts_hold_what_was_added(budget: int) -> None:
    rng, starts = random.Random(budget), Starts(budget)
    for digest in "ab":
        starts.plant(digest, FrontMemory([], 0))
    hits = 0
    for _ in range(500):
        digest = rng.choice("ab")
        tokens = [rng.randrange(3) for _ in range(rng.randint(1, 12))]
        found = starts.find(digest, tokens)
        got = [float(x) for part, count in found for x in part[1][0][0, :count, 0]]
        assert got == wanted(tokens)[: len(got)]
        assert len(got) == starts.known(digest, tokens)
        hits += len(got)
        new = starts.missing(digest, tokens)
        if new:
            starts.add(digest, tokens, memory(tokens[-new:], tokens[:-new]) if new == len(tokens) else behind(tokens, new))
        assert starts.tokens <= budget
        if budget == 10_000:
            assert starts.known(digest, tokens) == len(tokens)
    assert hits if budget else not hits
    assert starts.tokens == sum(len(n.tokens) for r in starts.roots.values() for n in everything(r))
    starts.fell("a")
    starts.fell("b")
    assert starts.tokens == 0 and not starts.fronts


def behind(tokens: list[int], new: int) -> Any:
    flat = torch.tensor(wanted(tokens)[-new:])[None, :, None]
    return [(flat, flat + 0.5)] * LAYERS


def everything(node: Any) -> list[Any]:
    return [node, *(n for child in node.children.values() for n in everything(child))]


def test_one_digest_sees_nothing_of_another() -> None:
    starts = Starts(100)
    for digest in ("v1", "v2"):
        starts.plant(digest, FrontMemory([], 0))
    starts.add("v1", [1, 2, 3], memory([1, 2, 3], []))
    assert starts.known("v1", [1, 2, 3, 4]) == 3 and starts.known("v2", [1, 2, 3, 4]) == 0


def test_the_least_recently_used_go_first() -> None:
    starts = Starts(6)
    starts.plant("a", FrontMemory([], 0))
    starts.add("a", [1, 2, 3], memory([1, 2, 3], []))
    starts.add("a", [4, 5, 6], memory([4, 5, 6], []))
    starts.find("a", [1, 2, 3])
    starts.add("a", [7], memory([7], []))
    assert [starts.known("a", t) for t in ([1, 2, 3], [4, 5, 6], [7])] == [3, 0, 1]
