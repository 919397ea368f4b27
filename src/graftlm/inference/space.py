"""Which places of the key-value cache belong to whom: extents of 2^k places each, by the buddy method (Knowlton, 1965).

    places   |0       |16      |32              |64                              |
    extents   a (16)   free 16  b (32)           free 64

A row that outgrows its extent gets the block that it is half of where the other half is free, else another extent of twice
the size. An extent that is given back joins its buddy. No torch here: the cache carries out what is decided.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush


@dataclass(frozen=True)
class Extent:
    """Places `start` to `start + size`; size is a power of two, and start a multiple of it."""

    start: int
    size: int

    @property
    def buddy(self) -> int:
        """Where the other half of the block begins that this one is half of."""
        return self.start ^ self.size


class Space:
    """All places of a cache.

    Args:
        capacity: places; what is left over below `smallest` is not used.
        smallest: size of the smallest extent, a power of two.
    """

    def __init__(self, capacity: int, smallest: int = 16) -> None:
        self.smallest = smallest
        self.free = 0
        self._starts: dict[int, set[int]] = {}  # by size, where free extents begin
        self._order: dict[int, list[int]] = {}  # the same as heaps, which may hold some that are free no longer
        start, size = 0, 1 << max(capacity, 1).bit_length()
        self.largest = 0
        while size >= smallest:
            if start + size <= capacity:
                self.largest = self.largest or size
                self._put(Extent(start, size))
                start += size
            size //= 2
        self.capacity = start

    def fitting(self, places: int) -> int:
        """The size of the extent that so many places take."""
        return max(self.smallest, 1 << max(places - 1, 0).bit_length())

    def take(self, places: int) -> Extent | None:
        """The first free extent for so many places, out of the smallest block that has one; None where there is none."""
        wanted = self.fitting(places)
        size = wanted
        while size <= self.largest and not self._starts.get(size):
            size *= 2
        if size > self.largest:
            return None
        extent = self._pop(size)
        while extent.size > wanted:
            extent = Extent(extent.start, extent.size // 2)
            self._put(Extent(extent.buddy, extent.size))
        return extent

    def give(self, extent: Extent) -> None:
        """Take an extent back."""
        while extent.size < self.largest and self._drop(Extent(extent.buddy, extent.size)):
            extent = Extent(min(extent.start, extent.buddy), extent.size * 2)
        self._put(extent)

    def grow(self, extent: Extent) -> Extent | None:
        """An extent of twice the size in place of this one, the block that it is half of where that can be; None where there
        is none."""
        if extent.size < self.largest and self._drop(Extent(extent.buddy, extent.size)):
            return Extent(min(extent.start, extent.buddy), 2 * extent.size)
        larger = self.take(2 * extent.size)
        if larger is not None:
            self.give(extent)
        return larger

    def fits(self, places: int) -> bool:
        """Whether there is an extent for so many places now."""
        size = self.fitting(places)
        return any(starts for free, starts in self._starts.items() if free >= size)

    def _put(self, extent: Extent) -> None:
        self._starts.setdefault(extent.size, set()).add(extent.start)
        heappush(self._order.setdefault(extent.size, []), extent.start)
        self.free += extent.size

    def _pop(self, size: int) -> Extent:
        """The first free extent of this size, of which there is one."""
        while (start := heappop(self._order[size])) not in self._starts[size]:
            pass
        self._starts[size].remove(start)
        self.free -= size
        return Extent(start, size)

    def _drop(self, extent: Extent) -> bool:
        """Take this very extent if it is free."""
        starts = self._starts.get(extent.size, set())
        if extent.start not in starts:
            return False
        starts.remove(extent.start)
        self.free -= extent.size
        return True
