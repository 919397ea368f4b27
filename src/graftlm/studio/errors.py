"""What a page answers where it cannot do what was asked."""

from __future__ import annotations

from ..errors import GraftError


class PageError(GraftError):
    """A refusal with its HTTP status, told to the user as it is."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
