"""What an allocator holds beyond what is alive, from the order in which storages come and go.

`CudaCache` does what c10's CUDACachingAllocator does by default: sizes are rounded up, small and large storages have
segments of their own, the best fitting free block is split, free neighbours become one, and no segment is given back. What
the system shows as used on a GPU is what is held, and CUDA's own context.

`glibc.Heap` is what a CPU's storages come from.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

MIB = 1 << 20
STATES = 2  # of AdamW, for each trained tensor
Event = tuple[int, int]
"""(number of a storage, its bytes) where it comes; (number, -its bytes) where it goes. Numbers below 0 are nodes of
autograd's graph, 1 and -1: objects in main memory, whatever the device."""


class Allocator(Protocol):
    """`held`: bytes that the system has given so far."""

    held: int

    def take(self, number: int, size: int) -> None:
        """A storage comes, or a node."""

    def give(self, number: int) -> None:
        """What came goes."""


class Free:
    """Free blocks, each within a stretch of addresses; neighbours are one."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []  # (size, address)
        self._starts: dict[int, int] = {}  # address -> size
        self._ends: dict[int, int] = {}  # address behind -> size

    def best(self, size: int) -> tuple[int, int] | None:
        """Address and size of the smallest block of at least this size, which is taken out; None for none."""
        at = bisect_left(self.sizes, (size, 0))
        if at == len(self.sizes):
            return None
        block, address = self.sizes[at]
        self._drop(address, block)
        return address, block

    def add(self, address: int, size: int) -> None:
        if (behind := self._starts.get(address + size)) is not None:
            self._drop(address + size, behind)
            size += behind
        if (before := self._ends.get(address)) is not None:
            self._drop(address - before, before)
            address, size = address - before, size + before
        insort(self.sizes, (size, address))
        self._starts[address] = self._ends[address + size] = size

    def _drop(self, address: int, size: int) -> None:
        del self.sizes[bisect_left(self.sizes, (size, address))]
        del self._starts[address], self._ends[address + size]


class CudaCache:
    """The segments of a GPU's allocator."""

    def __init__(self) -> None:
        self.held = self._edge = 0  # the edge is behind the last segment
        self._free = {False: Free(), True: Free()}  # of small and of large storages
        self._used: dict[int, tuple[int, int, bool]] = {}  # number -> address, size, whether it is large

    def take(self, number: int, size: int) -> None:
        if number < 0:
            return
        want = rounded(size, 512)
        large = want > MIB
        found = self._free[large].best(want)
        if found is None:
            found = self._edge, segment(want)
            self._edge += found[1] + 1  # no segment is another one's neighbour
            self.held += found[1]
        address, block = found
        left = block - want
        if left > MIB if large else left >= 512:
            self._free[large].add(address + want, left)
            block = want
        self._used[number] = address, block, large

    def give(self, number: int) -> None:
        if number >= 0:
            address, size, large = self._used.pop(number)
            self._free[large].add(address, size)


def rounded(size: int, unit: int) -> int:
    return max(-(-size // unit), 1) * unit


def segment(size: int) -> int:
    """Bytes that are asked of CUDA for a block: 2 MiB for small ones, 20 MiB for those below 10, else a multiple of 2."""
    if size <= MIB:
        return 2 * MIB
    return 20 * MIB if size < 10 * MIB else rounded(size, 2 * MIB)


@dataclass(frozen=True, kw_only=True)
class Training:
    """How it is trained.

    Attributes:
        batches: passes whose gradients are added up in an optimizer step.
        transient: copies of all trained tensors at the worst moment of an optimizer step: none if it is fused, one for
            torch's `foreach` kinds (before torch 2.1: two).
        flat: bytes of the weights of each recurrent network. cuDNN wants them in one storage, and makes their gradients in
            one.
    """

    batches: int = 1
    transient: int = 0
    flat: Sequence[Sequence[int]] = ()


def held_in_training(
    allocator: Allocator, before: Sequence[Event], trained: Sequence[int], step: Sequence[Event], how: Training
) -> int:
    """Bytes that an allocator holds after two optimizer steps of AdamW.

    Args:
        before: what comes (base and adapter), and may go, before the first step.
        trained: bytes of each tensor that is trained.
        step: a forward and backward pass after that; the gradients are what stays of it.
    """
    count = 1 + max([0, *(abs(number) for number, _ in [*before, *step])])

    def new(sizes: Iterable[int]) -> list[Event]:
        nonlocal count
        made = [(count + i, size) for i, size in enumerate(s for s in sizes if s)]
        count += len(made)
        play(allocator, made)
        return made

    play(allocator, before)
    for sizes in how.flat:
        play(allocator, gone(new(sizes)))  # what was there before it became one
    for update in range(2):
        sums: list[Event] = []
        for batch in range(how.batches):
            shift = count
            moved = [(number + (shift if number >= 0 else -shift), size) for number, size in step]
            count = 1 + max([count, *(abs(number) for number, _ in moved)])
            made = dict(staying(moved))
            if batch:  # each gradient is added to its sum and goes; those that one kernel makes go together
                play(allocator, [e for each in moved for e in ([each, *gone([each])] if each[0] in made else [each])])
                play(allocator, gone(new(map(sum, how.flat))))
            else:
                play(allocator, moved)
                sums = list(made.items())
        if not update:
            new(size for size in trained for _ in range(STATES))
        play(allocator, gone([*new(size for size in trained for _ in range(how.transient)), *sums]))
    return allocator.held


def play(allocator: Allocator, events: Iterable[Event]) -> int:
    """Storages come and go; what is held then."""
    for number, size in events:
        if size > 0:
            allocator.take(number, size)
        else:
            allocator.give(number)
    return allocator.held


def gone(events: Iterable[Event]) -> list[Event]:
    """Storages that came, as they go."""
    return [(number, -size) for number, size in events]


def within(events: Sequence[Event]) -> list[Event]:
    """What happens to storages that come among these events."""
    own = {number for number, size in events if size > 0}
    return [event for event in events if event[0] in own]


def staying(events: Iterable[Event]) -> list[Event]:
    """The storages that come and do not go."""
    found: dict[int, int] = {}
    for number, size in events:
        if size > 0:
            found[number] = size
        else:
            found.pop(number, None)
    return list(found.items())
