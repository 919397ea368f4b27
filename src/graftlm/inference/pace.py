"""How many tokens of prompts go into a step beside rows that decode: by the time that steps took, no tensors."""

from __future__ import annotations

_NEW = 0.2  # weight of the last step in the means
_MOST = 1.2  # of a step's time that prompts may add to it, where two decode for each that joins or more


class Pace:
    """Means of the seconds of a step in which all rows decode, and what prompts beside them add: something for there being
    any, and something for each token (the line of least squares through the last steps).

    Args:
        most: tokens of prompts in a step in which nobody decodes, and at most beside others.
        least: tokens at least, however slow they are, and before anything is known.
    """

    def __init__(self, most: int, least: int = 16) -> None:
        self.most = most
        self.least = min(least, most)
        self._plain = 0.0
        self._added: tuple[float, float, float, float] | None = None  # means of tokens, seconds, tokens^2, tokens * seconds

    def tokens(self, decoding: int, joining: int = 0) -> int:
        """For a step in which so many rows decode, and so many could if their prompts were there: the more of these, the
        less do they have to wait for the others."""
        if not decoding:
            return self.most
        share, wanted = max(1.0, 2 * joining / decoding), float(self.least)
        if self._plain and self._added is not None:
            fixed, each = self._line()
            wanted = max(wanted, (share * _MOST * self._plain - fixed) / each)
        else:
            wanted *= share
        return max(self.least, min(self.most - decoding, int(wanted)))

    def took(self, decoding: int, prompts: int, seconds: float) -> None:
        """A step of so many decoding rows and tokens of prompts was that long."""
        if decoding and not prompts:
            self._plain = _mean(self._plain, seconds) if self._plain else seconds
        elif decoding and self._plain:
            added = max(seconds - self._plain, 0.01 * seconds)
            new = prompts, added, prompts**2, prompts * added
            before = self._added or new
            self._added = tuple(map(_mean, before, new))  # type: ignore[assignment]

    def _line(self) -> tuple[float, float]:
        """Seconds for there being prompts, and for each of their tokens."""
        assert self._added is not None
        count, seconds, squares, products = self._added
        each, spread = seconds / count, squares - count**2
        if spread > 0.01 * count**2:  # else the steps are too much alike to tell the two apart
            each = min(each, max((products - count * seconds) / spread, 0.1 * each))
        return seconds - each * count, each


def _mean(before: float, new: float) -> float:
    return before + _NEW * (new - before)
