"""Consistent hashing (Karger et al., 1997): the names for a key, whoever asks, and whoever came or went."""

from __future__ import annotations

import hashlib
from bisect import bisect
from collections.abc import Iterable, Iterator

POINTS = 64  # of a name on the circle


class Ring:
    """Names on a circle of 64-bit numbers."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._points = sorted((spot(f"{name}#{i}"), name) for name in names for i in range(POINTS))
        self._spots = [at for at, _ in self._points]

    def walk(self, key: str | int, most: int) -> Iterator[str]:
        """At most so many different names, in the order of the circle behind the key's spot."""
        seen: set[str] = set()
        start = bisect(self._spots, spot(key))
        for step in range(len(self._points)):
            name = self._points[(start + step) % len(self._points)][1]
            if name not in seen:
                seen.add(name)
                yield name
                if len(seen) == most:
                    return


def spot(key: str | int) -> int:
    """Where a key stands, the same in every process."""
    return int.from_bytes(hashlib.blake2b(str(key).encode(), digest_size=8).digest(), "big")
