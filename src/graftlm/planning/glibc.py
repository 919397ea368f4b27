"""glibc's malloc (2.36), as it was written, of one thread: which block a request is cut from, and what a freed block joins.

`kernels.keep_freed_memory` sets it so that nothing is mapped apart and nothing given back. What counts is the highest
address that was handed out: memory above it was never touched.

A storage of torch is not the only thing that comes. It has two objects of its own (`STORAGE`), and each node of autograd's
graph brings small blocks that stay to the end of the backward pass (`NODES`). Where a large block was given back in between
(the copy of a quantised weight, what one operation hands to the next), they take a bit of its hole, which is then too short
for the next block of that size. This is where a step's memory goes beyond its activations.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import cycle

LEAST, ALIGNED = 32, 64  # bytes of the shortest block; of torch's alignment
FAST, CACHED, SMALL = 128, 1040, 1024  # longest block of fast bins, of the thread's cache; the shortest of large bins
KEPT = 7  # blocks of a size that the thread's cache keeps
MERGING = 1 << 16  # bytes of a freed block from which on fast bins are emptied

STORAGE = 104, 176  # StorageImpl and TensorImpl
NODES = (
    (480, 24, 24, 40), (480, 24, 24, 56), (480, 24, 176), (480, 24, 24, 312), (480, 24, 24, 40), (480, 24, 56),
    (480, 24, 24, 176), (480, 24, 24, 40),
)  # fmt: skip
"""Bytes of the blocks of a node: itself, its edges, sizes and names of what it saved, now and then a view. Counted, by size,
in the steps of T5 (NF4, int8) and Llama (fp32) with torch 2.13: 4.4, 4.6 and 4.6 of them a node, in the same shares."""


def block_of(size: int) -> int:
    """Bytes of the block for a request: its length stands before it."""
    return max((size + 23) & ~15, LEAST)


def bin_of(block: int) -> int:
    """The bin of free blocks of about this size."""
    if block < SMALL:
        return block >> 4
    for shift, most, first in ((6, 48, 48), (9, 20, 91), (12, 10, 110), (15, 4, 119), (18, 2, 124)):
        if block >> shift <= most:
            return first + (block >> shift)
    return 126


class Heap:
    """Blocks by address, from 0 upwards.

    Attributes:
        held: bytes up to the highest address that was handed out.
    """

    def __init__(self) -> None:
        self.held = self._top = 0
        self._used: dict[int, list[tuple[int, int]]] = {}  # number -> blocks (address, size)
        self._free: dict[int, int] = {}  # address -> size, of blocks in the unsorted list and in bins
        self._ends: dict[int, int] = {}  # address behind -> address
        self._unsorted: dict[int, None] = {}  # addresses, the oldest first
        self._sizes: list[int] = []  # that there are bins' blocks of
        self._bins: dict[int, list[int]] = {}  # size -> addresses
        # of the thread: size -> addresses, the newest last; it is full, of blocks that lie elsewhere
        self._cache = {size: [-(size << 8) - (i << 20) for i in range(KEPT)] for size in range(LEAST, CACHED + 1, 16)}
        self._fast: dict[int, list[int]] = {}  # fast bins likewise, whose blocks do not join their neighbours
        self._rest = -1  # what was left of the last block that was cut for a small request
        self._nodes = cycle(NODES)

    def take(self, number: int, size: int) -> None:
        """A storage comes, or (a number below 0) a node."""
        if number < 0:
            self._used[number] = [self._small(n) for n in next(self._nodes)]
        else:
            self._used[number] = [self._aligned(size), *map(self._small, STORAGE)]

    def give(self, number: int) -> None:
        """What came goes."""
        for address, size in self._used.pop(number):
            self._back(address, size)

    # -- requests -----------------------------------------------------------------------------------------------------------
    def _small(self, size: int) -> tuple[int, int]:
        """malloc."""
        block = block_of(size)
        if cached := self._cache.get(block):
            return cached.pop(), block
        return self._block(block)

    def _aligned(self, size: int) -> tuple[int, int]:
        """posix_memalign: a longer block is cut, and both its ends are given back."""
        want = block_of(size)
        address, got = self._block(block_of(want + ALIGNED + LEAST))
        before = -(address + 16) % ALIGNED
        before += ALIGNED * (0 < before < LEAST)
        if before:
            self._back(address, before)
        address, got = address + before, got - before
        if got > want + LEAST:
            self._back(address + want, got - want)
            got = want
        return address, got

    def _block(self, want: int) -> tuple[int, int]:
        """_int_malloc: fast bins, bins of just this size, what was freed last, the best fitting block, the top."""
        small, cache = want < SMALL, self._cache.setdefault(want, []) if want <= CACHED else None
        if want <= FAST and (fast := self._fast.get(want)):
            address = fast.pop()
            while fast and cache is not None and len(cache) < KEPT:
                cache.append(fast.pop())
            return address, want
        if small and want in self._bins:
            address = self._oldest(want)
            while want in self._bins and cache is not None and len(cache) < KEPT:
                cache.append(self._oldest(want))
            return address, want
        if not small:
            self._merge_fast()
        while True:
            found = self._sorted(want, small, cache) or self._best(want, small)
            if found is not None:
                return found
            if not self._fast or self._top + want <= self.held:
                break
            self._merge_fast()
        address, self._top = self._top, self._top + want
        self.held = max(self.held, self._top)
        return address, want

    def _oldest(self, size: int) -> int:
        address = self._bins[size][-1]
        self._drop(address)
        return address

    def _sorted(self, want: int, small: bool, cache: list[int] | None) -> tuple[int, int] | None:
        """Bring what was freed into bins; a block of just this size is taken. A small request goes on cutting what the last
        one left, where nothing else was freed."""
        found = False
        while self._unsorted:
            address = next(iter(self._unsorted))
            size = self._free[address]
            if small and address == self._rest and len(self._unsorted) == 1 and size > want + LEAST:
                self._drop(address)
                self._rest = address + want
                self._put(self._rest, size - want)
                return address, want
            if size == want:
                self._drop(address)
                if cache is None or len(cache) == KEPT:
                    return address, want
                cache.append(address)
                found = True
                continue
            del self._unsorted[address]
            if size in self._bins:
                self._bins[size].insert(size >= SMALL, address)
            else:
                self._bins[size] = [address]
                insort(self._sizes, size)
        return (cache.pop(), want) if found and cache else None

    def _best(self, want: int, small: bool) -> tuple[int, int] | None:
        """From the smallest block that is long enough; what is left of it is free again."""
        at = bisect_left(self._sizes, want)
        if at == len(self._sizes):
            return None
        size = self._sizes[at]
        alike = self._bins[size]
        address = alike[min(1, len(alike) - 1)] if not small and bin_of(size) == bin_of(want) else alike[-1]
        self._drop(address)
        if size - want < LEAST:
            return address, size
        self._put(address + want, size - want)
        if small:
            self._rest = address + want
        return address, want

    # -- what is given back -------------------------------------------------------------------------------------------------
    def _back(self, address: int, size: int) -> None:
        """_int_free."""
        if size <= CACHED and len(cache := self._cache.setdefault(size, [])) < KEPT:
            cache.append(address)
        elif size <= FAST:
            self._fast.setdefault(size, []).append(address)
        elif self._join(address, size) >= MERGING:
            self._merge_fast()

    def _join(self, address: int, size: int) -> int:
        """A free block becomes one with its free neighbours; the size of all."""
        if (before := self._ends.get(address)) is not None:
            size += self._drop(before)
            address = before
        if address + size == self._top:
            self._top = address
            return max(size, MERGING)  # the top is long as a rule
        if address + size in self._free:
            size += self._drop(address + size)
        self._put(address, size)
        return size

    def _merge_fast(self) -> None:
        fast, self._fast = self._fast, {}
        for size in sorted(fast):
            for address in reversed(fast[size]):
                self._join(address, size)

    def _put(self, address: int, size: int) -> None:
        """A free block, not sorted yet."""
        self._free[address], self._ends[address + size] = size, address
        self._unsorted[address] = None

    def _drop(self, address: int) -> int:
        """A block is free no more; its size."""
        size = self._free.pop(address)
        del self._ends[address + size]
        if address in self._unsorted:
            del self._unsorted[address]
        else:
            self._bins[size].remove(address)
            if not self._bins[size]:
                del self._bins[size], self._sizes[bisect_left(self._sizes, size)]
        return size
