"""How many tokens of prompts go into a step beside rows that decode: by the time that steps took, no tensors."""

from __future__ import annotations

_NEW = 0.2  # weight of the last step in the means
_MOST = 1.2  # of a step's time that prompts may add to it, where two decode for each that joins or more


class Pace:
    """Means of the seconds of a step in which all rows decode, and of a prompt's token beside them.

    Args:
        most: tokens of prompts in a step in which nobody decodes, and at most beside others.
        least: tokens at least, however slow they are, and before anything is known.
    """

    def __init__(self, most: int, least: int = 16) -> None:
        self.most = most
        self.least = min(least, most)
        self._plain = self._token = 0.0

    def tokens(self, decoding: int, joining: int = 0) -> int:
        """For a step in which so many rows decode, and so many could if their prompts were there: the more of these, the
        less do they have to wait for the others."""
        if not decoding:
            return self.most
        share = max(1.0, 2 * joining / decoding)
        known = self._plain and self._token
        beside = _MOST * self._plain / self._token if known else self.least
        return max(self.least, min(self.most - decoding, int(share * beside)))

    def took(self, decoding: int, prompts: int, seconds: float) -> None:
        """A step of so many decoding rows and tokens of prompts was that long."""
        if decoding and not prompts:
            self._plain = _mean(self._plain, seconds)
        elif decoding and self._plain:
            self._token = _mean(self._token, max(seconds - self._plain, 0.01 * seconds) / prompts)


def _mean(before: float, new: float) -> float:
    return before + _NEW * (new - before) if before else new
