"""The scheduler by simulation: thousands of random arrivals, without a model."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

import pytest

from graftlm.inference.scheduler import Scheduler, Sequence, Step
from graftlm.inference.space import Extent, Space


class World:
    """A model that only counts: it checks every step that it is given."""

    def __init__(self, scheduler: Scheduler, lengths: dict[Sequence, int] | None = None) -> None:
        self.scheduler = scheduler
        self.left: dict[Sequence, int] = lengths or {}  # tokens that each still writes
        self.written: dict[Sequence, int] = defaultdict(int)
        self.held: dict[Sequence, int] = {}  # places that the cache holds of it
        self.prefilled: dict[Any, int] = defaultdict(int)
        self.ended: list[Sequence] = []
        self.gone: list[Sequence] = []  # expired
        self.preemptions = self.steps = 0

    def add(self, sequence: Sequence, writes: int) -> None:
        self.left[sequence] = writes
        self.scheduler.add(sequence)

    def step(self, now: float = 0.0) -> Step:
        scheduler = self.scheduler
        step = scheduler.schedule(now)
        self.steps += 1
        self.gone += step.expired
        self.preemptions += len(step.preempted)
        for sequence in (*step.preempted, *step.expired):
            self.held.pop(sequence, None)
        for sequence in step.joined:
            self.held[sequence] = sequence.front + sequence.done
        self.check(step)
        scheduler.ran(step.pieces)
        for piece in step.pieces:
            self.held[piece.sequence] += piece.count
            if not piece.sequence.pending:
                self.write(piece.sequence)
        return step

    def write(self, sequence: Sequence) -> None:
        sequence.tokens.append(7)
        self.written[sequence] += 1
        if self.written[sequence] == self.left[sequence]:
            self.scheduler.remove(sequence)
            del self.held[sequence]
            self.ended.append(sequence)

    def check(self, step: Step) -> None:
        scheduler = self.scheduler
        names = [piece.sequence for piece in step.pieces]
        assert len(set(names)) == len(names)
        assert len(scheduler.rows) <= scheduler.max_rows
        taken: list[tuple[int, int]] = []
        for row in scheduler.rows:
            assert row.extent is not None
            assert row.extent.start % row.extent.size == 0
            taken.append((row.extent.start, row.extent.start + row.extent.size))
        for (_, end), (start, _) in zip(sorted(taken), sorted(taken)[1:], strict=False):
            assert end <= start
        assert sum(b - a for a, b in taken) + scheduler.space.free == scheduler.space.capacity
        chunks = decoding = 0
        for piece in step.pieces:
            row = piece.sequence
            assert piece.count >= 1 and row.extent is not None
            assert self.held[row] == row.front + row.done
            assert row.front + row.done + piece.count <= row.extent.size
            if row.filling:
                chunks += piece.count
                self.prefilled[row.group] += piece.count
            else:
                decoding += 1
                assert piece.count == 1
        assert chunks <= max(scheduler.least_chunk, scheduler.step_tokens - decoding)
        decoders = {r for r in scheduler.rows if not r.filling}
        assert decoders <= set(names)  # nobody who decodes is passed over
        if scheduler.busy:
            assert step.pieces  # something always goes on


def drain(world: World, limit: int = 100_000) -> None:
    while world.scheduler.busy:
        world.step()
        assert world.steps < limit, "stuck"


@pytest.mark.parametrize("seed", [0, 1, 2, *(pytest.param(n, marks=pytest.mark.slow) for n in range(3, 8))])
@pytest.mark.parametrize("capacity", [1 << 9, 3000, 1 << 14])
def test_nothing_is_lost_or_stuck(seed: int, capacity: int) -> None:
    """Random arrivals, cancels and deadlines under every pressure on the cache."""
    rng = random.Random(seed)
    space = Space(capacity)
    scheduler = Scheduler(
        space, max_rows=rng.choice([1, 4, 16]), step_tokens=rng.choice([8, 64]), quantum=rng.choice([32, 256])
    )
    world, cancelled, everyone = World(scheduler), [], []
    for now in range(700):
        for _ in range(rng.choice([0, 0, 1, 2]) if now < 400 else 0):
            most = space.largest
            front, prompt = rng.choice([0, 0, 5]), rng.randint(1, rng.choice([8, 60, most // 2]))
            writes = rng.randint(1, min(60, most - front - prompt))
            deadline = now + rng.randint(1, 300) if rng.random() < 0.1 else None
            sequence = Sequence(tokens=[1] * prompt, group=rng.randint(0, 5), front=front, deadline=deadline)
            everyone.append(sequence)
            world.add(sequence, writes)
        if rng.random() < 0.05 and everyone:
            one = rng.choice(everyone)
            if one not in world.ended and one not in world.gone and one not in cancelled:
                scheduler.remove(one)
                world.held.pop(one, None)
                cancelled.append(one)
        world.step(now)
    drain(world)
    assert len(everyone) > 250
    assert sorted(s.number for s in (*world.ended, *world.gone, *cancelled)) == list(range(len(everyone)))
    assert space.free == space.capacity and not scheduler.order and not scheduler.turns
    assert all(world.written[s] == world.left[s] for s in world.ended)
    if capacity == 1 << 9 and scheduler.max_rows > 4:
        assert world.preemptions


@pytest.mark.parametrize("quantum", [16, 64, 256])
def test_backlogged_compositions_are_served_alike(quantum: int) -> None:
    """Whatever the sizes of their prompts: prompts' tokens of any two differ by two quanta at most, at all times."""
    rng = random.Random(quantum)
    scheduler = Scheduler(Space(1 << 16), max_rows=64, step_tokens=48, quantum=quantum)
    world = World(scheduler)
    sizes = {0: (300, 400), 1: (1, 6), 2: (40, 60), 3: (1, 200)}
    for now in range(600):
        for group, (least, most) in sizes.items():
            turn = scheduler.turns.get(group)
            while turn is None or sum(s.pending for s in turn.waiting) < 600:
                world.add(Sequence(tokens=[1] * rng.randint(least, most), group=group), 1)
                turn = scheduler.turns[group]
        world.step(now)
        served = [world.prefilled[g] for g in sizes]
        assert max(served) - min(served) <= 2 * quantum, (now, served)
    assert min(world.prefilled.values()) > 3000


def test_a_long_prompt_holds_decoding_back_by_one_chunk() -> None:
    scheduler = Scheduler(Space(1 << 13), step_tokens=64)
    world = World(scheduler)
    short = [Sequence(tokens=[1] * 4, group=i) for i in range(4)]
    for sequence in short:
        world.add(sequence, 200)
    world.step()
    long = Sequence(tokens=[1] * 3000, group="long")
    world.add(long, 1)
    while long.filling:
        before = [world.written[s] for s in short]
        step = world.step()
        assert [world.written[s] for s in short] == [n + 1 for n in before]
        assert sum(p.count for p in step.pieces) <= 64
    assert world.steps == 1 + -(-3000 // 60)


def test_a_short_prompt_overtakes_a_long_one_of_another_adapter() -> None:
    scheduler = Scheduler(Space(1 << 13), step_tokens=64, quantum=128)
    world = World(scheduler)
    long, short = Sequence(tokens=[1] * 3000, group="a"), Sequence(tokens=[1] * 20, group="b")
    world.add(long, 1)
    world.step()
    world.add(short, 1)
    while short not in world.ended:
        world.step()
    assert world.steps <= 4


def test_a_large_prompt_is_not_starved_by_small_ones() -> None:
    scheduler = Scheduler(Space(1 << 9), max_rows=32)
    world = World(scheduler)
    large = Sequence(tokens=[1] * 300, group="large")
    for now in range(60):
        for _ in range(4):
            world.add(Sequence(tokens=[1] * 10, group="small"), 20)
        if now == 5:
            world.add(large, 3)
        world.step(now)
    for _ in range(100):
        world.step()
    assert large in world.ended


def test_the_oldest_row_goes_on_when_the_cache_is_full() -> None:
    scheduler = Scheduler(Space(64, smallest=16), max_rows=4)
    world = World(scheduler)
    rows = [Sequence(tokens=[1] * 8, group=i) for i in range(4)]
    for row in rows:
        world.add(row, 50)
    drain(world)
    assert world.preemptions and world.ended[0] is rows[0]
    assert all(len(row.tokens) == 58 for row in rows)


def test_what_is_known_is_not_computed_again() -> None:
    scheduler = Scheduler(Space(1 << 10), known=lambda s: 100)
    world = World(scheduler)
    first, second = Sequence(tokens=[1] * 120), Sequence(tokens=[1] * 100)
    world.add(first, 2)
    world.add(second, 2)
    step = world.step()
    assert [(p.sequence, p.count) for p in step.pieces] == [(first, 20), (second, 1)]
    assert (first.cached, second.cached) == (100, 99)
    drain(world)


def test_a_deadline_passes_while_waiting_and_while_running() -> None:
    scheduler = Scheduler(Space(1 << 10), max_rows=1)
    world = World(scheduler)
    running, waiting, last = (Sequence(tokens=[1] * 4, group=i, deadline=d) for i, d in enumerate((5.0, 3.0, None)))
    for sequence in (running, waiting, last):
        world.add(sequence, 100)
    for now in range(7):
        world.step(float(now))
    assert world.gone == [waiting, running] and scheduler.rows == [last]


# -- places --------------------------------------------------------------------------------------------------------------
def test_extents() -> None:
    space = Space(100, smallest=8)
    assert (space.capacity, space.largest) == (96, 64)
    first, second = space.take(5), space.take(20)
    assert first is not None and second is not None
    assert (first.size, second.size) == (8, 32)
    assert (first.start, second.start) == (64, 0)  # out of the smallest block each
    assert not space.fits(64) and space.take(64) is None and space.free == 56
    space.give(first)
    space.give(second)
    assert space.take(65) is None and space.take(64) == Extent(0, 64) and space.free == 32


def test_an_extent_grows_where_it_lies() -> None:
    space = Space(64, smallest=8)
    row = space.take(8)
    assert row is not None
    assert space.grow(row) == Extent(0, 16)
    other = space.take(16)
    assert other == Extent(16, 16)
    assert space.grow(Extent(0, 16)) == Extent(32, 32)
    assert space.free == 16
    assert space.grow(Extent(32, 32)) is None
    space.give(other)
    assert space.grow(Extent(32, 32)) == Extent(0, 64)


@pytest.mark.parametrize("seed", range(5))
def test_extents_never_overlap_and_all_come_back(seed: int) -> None:
    rng, space = random.Random(seed), Space(5000)
    held: list[Extent] = []
    for _ in range(3000):
        choice = rng.random()
        if choice < 0.5:
            extent = space.take(rng.randint(1, 700))
            held += [extent] if extent else []
        elif held and choice < 0.6:
            extent = held.pop(rng.randrange(len(held)))
            held.append(space.grow(extent) or extent)
        elif held:
            space.give(held.pop(rng.randrange(len(held))))
        ends = sorted((e.start, e.start + e.size) for e in held)
        assert all(a[1] <= b[0] for a, b in zip(ends, ends[1:], strict=False))
        assert sum(e.size for e in held) + space.free == space.capacity
    for extent in held:
        space.give(extent)
    assert space.free == space.capacity and space.fits(space.largest)


def test_a_chunk_is_sized_by_those_who_decode_and_those_who_join() -> None:
    asked: list[tuple[int, int]] = []

    def chunk(decoding: int, joining: int) -> int:
        asked.append((decoding, joining))
        return 20

    scheduler = Scheduler(Space(4096), max_rows=4, chunk=chunk)
    for _ in range(6):
        scheduler.add(Sequence(tokens=[1] * 20))
    for _ in range(3):
        scheduler.ran(scheduler.schedule().pieces)
        for row in scheduler.rows:
            if not row.pending:
                row.tokens.append(1)
    assert asked == [(0, 4), (1, 3), (2, 2)]  # two wait for a row to end
