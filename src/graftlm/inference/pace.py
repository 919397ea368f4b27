"""How many tokens of prompts go into a step beside rows that decode: by the time that steps took, no tensors."""

from __future__ import annotations

import numpy as np

_MOST = 1.2  # of a step's time that prompts may add to it, where two decode for each that joins or more
_KEPT = 0.95  # of what is known, at each step
_SURE = np.array([1e-5, 1e-5, 1e-3, 1e-5])  # of the variation there is: less tells nothing; in doubt it is the tokens
_ROWS, _TOKENS = 8, 64  # units, in which all that a step's time depends on varies alike


class Pace:
    """A step's seconds by its decoding rows and its prompts: something for itself and for each row, something for there
    being any prompt and for each of its tokens (least squares of the relative errors of the last steps, by ridge regression,
    Hoerl and Kennard, 1970).

    Args:
        most: tokens of prompts in a step in which nobody decodes, and at most beside others.
        least: tokens at least, however slow they are, and before anything is known.
    """

    def __init__(self, most: int, least: int = 16) -> None:
        self.most = most
        self.least = min(least, most)
        self._products = np.zeros((4, 4))
        self._sums = np.zeros(4)
        self._known = False

    def tokens(self, decoding: int, joining: int = 0) -> int:
        """For a step in which so many rows decode, and so many could if their prompts were there: the more of these, the
        less do they have to wait for the others."""
        if not decoding:
            return self.most
        share, wanted = max(1.0, 2 * joining / decoding), float(self.least)
        if self._known:
            plain, fixed, each = self._costs(decoding)
            wanted = max(wanted, (share * _MOST * plain - fixed) / each)
        else:
            wanted *= share
        return max(self.least, min(self.most - decoding, int(wanted)))

    def took(self, decoding: int, prompts: int, seconds: float) -> None:
        """A step of so many decoding rows and tokens of prompts was that long."""
        of = np.array([1.0, decoding / _ROWS, prompts > 0, prompts / _TOKENS]) / max(seconds, 1e-9)
        self._products = _KEPT * self._products + np.outer(of, of)
        self._sums = _KEPT * self._sums + of
        self._known = self._known or (decoding > 0 and prompts > 0)

    def _costs(self, decoding: int) -> tuple[float, float, float]:
        """Seconds of a step of so many rows, and what is added for there being prompts and for each of their tokens."""
        ridge = np.diag(_SURE) * np.trace(self._products)
        base, row, fixed, each = np.linalg.solve(self._products + ridge, self._sums).tolist()
        usual = float(self._products[2, 3] / self._products[2, 2])  # tokens of a step's prompts
        added = max(fixed + each * usual, 0.01 * base, 1e-9)
        each = min(max(each, 0.1 * added / usual), added / usual)
        return max(base + row * decoding / _ROWS, 1e-9), added - each * usual, each / _TOKENS
