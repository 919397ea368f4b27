"""Low-rank updates of many tokens at once beside the same ones token by token."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from helpers import close

from graftlm.layers.change import LowRank
from graftlm.passes import stack as stack_module
from graftlm.passes.beside import RowsBeside
from graftlm.passes.stack import Shape, Stack

IN, PLACE = 12, (0, "up")


class Acts:
    """What is asked of a composition."""

    def __init__(self, **known: Any) -> None:
        vars(self).update({"others": {}, "tails": {}, "in_modules": False, **known})


def acting(widths: list[int], ranks: dict[int, list[int]], generator: torch.Generator) -> Any:
    """A composition with updates of these ranks on layers of these widths, which are computed in one product."""
    lows, ends = [], torch.tensor(widths).cumsum(0).tolist()
    for layer, own in ranks.items():
        for r in own:
            sides = (torch.randn(shape, generator=generator) for shape in ((r, IN), (widths[layer], r)))
            lows.append((layer, LowRank(*sides, scale=0.5)))
    columns = tuple(slice(end - width, end) for end, width in zip(ends, widths, strict=True))
    shape = Shape(IN, tuple(sum(ranks.get(layer, [0])) for layer in range(len(widths))), columns)
    found = {PLACE: lows} if lows else {}
    return Acts(lows=found, shapes={PLACE: shape} if lows else {}, columns=columns)


def as_token_by_token(
    beside: RowsBeside, everyone: list[Any], of: list[int], counts: list[int], width: int, generator: torch.Generator
) -> None:
    x = torch.randn(sum(counts), IN, generator=generator)
    y = torch.randn(sum(counts), width, generator=generator)
    wanted, start = y.clone(), 0
    for own, count in zip(of, counts, strict=True):
        rows = slice(start, start + count)
        for layer, low in everyone[own].lows.get(PLACE, []):
            wanted[rows, everyone[own].columns[layer]] += low.scale * (x[rows] @ low.a.t() @ low.b.t())
        start += count
    for act in beside[PLACE]:
        act(y, x)
    close(y, wanted)


RANKS: list[dict[int, list[int]]] = [{0: [4], 1: [4], 2: [4]}, {1: [2, 3]}, {}, {0: [1], 2: [6]}, {0: [4], 1: [4], 2: [4]}]


@pytest.mark.parametrize("widths", [[8, 8, 8], [16, 4, 4]], ids=["of one width", "of several"])
@pytest.mark.parametrize(
    ("of", "counts"),
    [([0, 1, 3, 4], [1] * 4), ([4, 3, 2, 1, 0], [1] * 5), ([2, 0, 0, 0, 1, 3, 4, 4], [1] * 8),
     ([2, 0, 0, 1, 1], [1] * 5),
     ([0, 4, 0, 1, 0, 2], [1] * 6), ([0, 1, 3, 4], [1, 20, 1, 3]), ([3, 3], [1, 30])],
    ids=["one each", "one each, turned round", "some have more", "two each", "apart", "a prompt beside", "one composition"],
)  # fmt: skip
def test_updates_as_token_by_token(widths: list[int], of: list[int], counts: list[int]) -> None:
    generator, stack = torch.Generator().manual_seed(0), Stack()
    everyone = [acting(widths, ranks, generator) for ranks in RANKS]
    stack.hold([a for a in everyone if a.lows])  # slots in another order than the rows'
    different = sorted(set(of))
    beside = RowsBeside(
        stack, [everyone[i] for i in different], [different.index(i) for i in of], counts, torch.device("cpu")
    )
    as_token_by_token(beside, everyone, of, counts, sum(widths), generator)


def test_layers_of_one_width_hold_no_zeros() -> None:
    stack, generator = Stack(), torch.Generator().manual_seed(0)
    stack.hold([acting([8, 8], {0: [4], 1: [4]}, generator)])
    assert [tuple(t.shape[1:]) for t in stack.of(slice(0, 1))[PLACE]] == [(IN, 8), (2, 4, 8)]


@pytest.mark.parametrize("room", [True, False], ids=["memory for others", "none"])
def test_compositions_that_come_and_go(room: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of any of twelve, one token each: always as token by token, and with memory for all each is written once."""
    written: list[Any] = []
    plain = Stack._write
    monkeypatch.setattr(Stack, "_write", lambda self, slot, a: (written.append(a), plain(self, slot, a))[1])
    if not room:
        monkeypatch.setattr(stack_module, "_SHARE", 1 << 60)
    generator, rng, stack = torch.Generator().manual_seed(0), random.Random(0), Stack()
    everyone = [acting([8, 8], {0: [2], 1: [3]}, generator) for _ in range(12)]
    for step in range(60):
        of = rng.sample(range(12), 1 if step == 0 else rng.randint(1, 4))
        different = sorted(of)
        rows = RowsBeside(
            stack, [everyone[i] for i in different], [different.index(i) for i in of], [1] * len(of), torch.device("cpu")
        )
        assert rows.current
        slots = [stack.slots.index(everyone[i]) for i in of]
        assert max(slots) - min(slots) < 2 * len(of), "they would not be multiplied together"
        as_token_by_token(rows, everyone, of, [1] * len(of), 16, generator)
    assert len(stack.slots) == (16 if room else 4)
    assert len(written) == 12 if room else len(written) > 30


def test_the_one_wanted_longest_ago_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack_module, "_SHARE", 1 << 60)  # no memory for more
    generator, stack = torch.Generator().manual_seed(0), Stack()
    a, b, c = (acting([8], {0: [2]}, generator) for _ in range(3))
    stack.hold([a, b])
    stack.hold([a])
    stack.hold([c])
    assert a in stack.slots
    assert b not in stack.slots
    stack.drop([c])
    stack.hold([b])
    assert stack.slots.count(None) == 0
    assert a in stack.slots
