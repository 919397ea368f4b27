"""The factors of compositions' low-rank updates, joined by place and kept in slots (see `beside`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import psutil
import torch
from torch import Tensor

from ..layers.change import LowRank

Place = tuple[int, str]  # a layer, and a product in it
Low = list[tuple[int, LowRank]]  # updates of the layers of a product, each with its layer's number in it
Factors = dict[Place, tuple[Tensor, Tensor]]
KEPT = 64  # compositions of which it is known what they do; their factors are those of the adapters themselves
_SHARE = 8  # of the free memory, for factors that are kept for later


@dataclass(frozen=True)
class Shape:
    """A composition's low-rank updates at a product: the size of what they read; each layer's ranks in sum, and columns."""

    size: int
    ranks: tuple[int, ...]
    columns: tuple[slice, ...]


class Updating(Protocol):
    """A composition: its low-rank updates and their shapes, by place."""

    lows: dict[Place, Low]
    shapes: dict[Place, Shape]


class Stack:
    """Joint factors of the low-rank updates of compositions, by place: A [slots, in, L r] and B [slots, L, r, width], the
    smaller ranks filled with zeros. Slots are written as compositions come; while the memory is there others are kept for
    when they come again, and those of a step lie near each other.

    Attributes:
        slots: whose each is.
        changes: how often something was written.
    """

    def __init__(self) -> None:
        self.slots: list[Updating | None] = []
        self.changes = 0
        self._used: list[int] = []  # when a slot was last wanted
        self._factors: dict[Place, tuple[Tensor, Tensor]] = {}
        self._views: dict[tuple[int, int], Factors] = {}  # as they were asked for since the last change

    def of(self, slots: slice) -> Factors:
        """The factors of some slots, at the places where one of these has any."""
        key = slots.start, slots.stop
        if key not in self._views:
            places = {place for acting in self.slots[slots] if acting is not None for place in acting.lows}
            self._views[key] = {p: (a[slots], b[slots]) for p, (a, b) in self._factors.items() if p in places}
        return self._views[key]

    @torch.no_grad()
    def hold(self, wanted: Sequence[Updating]) -> None:
        """Have the factors of these."""
        missing = [acting for acting in wanted if acting not in self.slots]
        if missing:
            self._change()
            if not self._fit(missing) or (slots := self._free(len(missing), wanted)) is None:
                self._make(wanted)
            else:
                for slot, acting in zip(slots, missing, strict=True):
                    self._write(slot, acting)
        self._gather([self.slots.index(acting) for acting in wanted])
        latest = max(self._used, default=0) + 1
        for acting in wanted:
            self._used[self.slots.index(acting)] = latest

    def drop(self, gone: Sequence[Updating]) -> None:
        """Forget these: their values change, or nobody knows them any more."""
        self.slots = [None if acting in gone else acting for acting in self.slots]
        self._views = {}

    def _change(self) -> None:
        self.changes += 1
        self._views = {}

    def _free(self, count: int, wanted: Sequence[Updating]) -> list[int] | None:
        """Slots to be written: empty ones, else those wanted longest ago; None where there are not as many."""
        while self.slots.count(None) < count and self._grow():
            pass
        empty = [slot for slot, acting in enumerate(self.slots) if acting is None]
        others = [slot for slot, acting in enumerate(self.slots) if acting is not None and acting not in wanted]
        slots = [*empty, *sorted(others, key=self._used.__getitem__)][:count]
        return slots if len(slots) == count else None

    def _grow(self) -> bool:
        """Twice as many slots, if the memory is there."""
        size = sum(t.nbytes for pair in self._factors.values() for t in pair)
        on_cpu = all(a.device.type == "cpu" for a, _ in self._factors.values())
        if not size or not on_cpu or 2 * len(self.slots) > KEPT or 2 * size > psutil.virtual_memory().available // _SHARE:
            return False
        self._factors = {
            place: (torch.cat((a, torch.zeros_like(a))), torch.cat((b, torch.zeros_like(b))))
            for place, (a, b) in self._factors.items()
        }
        self._used += [0] * len(self.slots)
        self.slots += [None] * len(self.slots)
        return True

    def _gather(self, wanted: Sequence[int]) -> None:
        """Exchange slots where those that are wanted lie so far apart that they would not be multiplied together."""
        if not wanted or max(wanted) - min(wanted) < 2 * len(wanted):
            return
        self._change()
        starts = range(len(self.slots) - len(wanted) + 1)
        start = max(starts, key=lambda at: sum(at <= slot < at + len(wanted) for slot in wanted))
        window = range(start, start + len(wanted))
        outside = [slot for slot in wanted if slot not in window]
        for one, other in zip(outside, (slot for slot in window if slot not in wanted), strict=True):
            for pair in self._factors.values():
                for t in pair:
                    t[[one, other]] = t[[other, one]]
            slots, used = self.slots, self._used
            slots[one], slots[other] = slots[other], slots[one]
            used[one], used[other] = used[other], used[one]

    def _fit(self, new: Sequence[Updating]) -> bool:
        """Whether there is place for the factors of these."""
        for acting in new:
            for place, shape in acting.shapes.items():
                a, b = self._factors.get(place, (None, None))
                if a is None or b is None or _rank(shape, b.shape[1]) > b.shape[2]:
                    return False
                if any(low.a.dtype is not a.dtype for _, low in acting.lows[place]):
                    return False
        return True

    def _make(self, wanted: Sequence[Updating]) -> None:
        room = 1 << (len(wanted) - 1).bit_length()  # they come one by one
        self.slots, self._used, self._factors = [None] * room, [0] * room, {}
        for place in {place for acting in wanted for place in acting.lows}:
            own = [acting for acting in wanted if place in acting.lows]
            shape, factors = own[0].shapes[place], [low.a for acting in own for _, low in acting.lows[place]]
            out = shape.columns[-1].stop
            sizes = []  # of what is read of a slot, in one piece and in one a layer
            for count in _divisions(shape.columns):
                rank = max(_rank(acting.shapes[place], count) for acting in own)
                sizes.append((rank * (shape.size * count + out), count, rank))
            _, count, rank = min(sizes)
            dtype = factors[0].dtype if len({f.dtype for f in factors}) == 1 else torch.float32
            shapes = (shape.size, count * rank), (count, rank, out // count)
            made = (factors[0].new_zeros(room, *sides, dtype=dtype) for sides in shapes)
            self._factors[place] = tuple(made)  # type: ignore[assignment]
        for slot, acting in enumerate(wanted):
            self._write(slot, acting)

    def _write(self, slot: int, acting: Updating) -> None:
        self.slots[slot] = acting
        downs: list[Tensor] = []
        ups: list[Tensor] = []
        lows = [low for place in self._factors for _, low in acting.lows.get(place, ())]
        for place, (a, b) in self._factors.items():
            (_, count, rank, width), own = b.shape, acting.lows.get(place, [])
            down, up, filled = a[slot], b[slot], [0] * count  # ranks, by part of B
            if sum(len(low.a) for _, low in own) < down.shape[1] or (count == 1 and own[0][0] != own[-1][0]):
                down.zero_()
                up.zero_()
            for layer, low in own:
                columns = acting.shapes[place].columns[layer] if count == 1 else slice(0, width)
                part, size = layer if count > 1 else 0, len(low.a)
                downs.append(down.narrow(1, part * rank + filled[part], size))
                ups.append(up[part].narrow(0, filled[part], size).narrow(1, columns.start, columns.stop - columns.start))
                filled[part] += size
        if lows:  # hundreds of small tensors: each by itself would take its time in Python
            torch._foreach_copy_(downs, [low.a.t() for low in lows])
            torch._foreach_copy_(ups, [low.b.t() for low in lows])
            torch._foreach_mul_(ups, [float(low.scale) for low in lows])


def _divisions(columns: tuple[slice, ...]) -> list[int]:
    """In how many parts B may lie."""
    widths = {part.stop - part.start for part in columns}
    return [1, len(columns)] if len(columns) > 1 and len(widths) == 1 else [1]


def _rank(shape: Shape, count: int) -> int:
    """The rank that B needs in so many parts."""
    return sum(shape.ranks) if count == 1 else max(shape.ranks)
