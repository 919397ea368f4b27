"""A sequence of a packed row."""

from __future__ import annotations

from typing import NamedTuple


class Piece(NamedTuple):
    """A sequence of a packed row.

    Args:
        start, end: its tokens.
        front: shared tokens that it sees as well, (first, last + 1); (0, 0) for none.
        memory: which memory it sees; None for none.
    """

    start: int
    end: int
    front: tuple[int, int] = (0, 0)
    memory: int | None = None
