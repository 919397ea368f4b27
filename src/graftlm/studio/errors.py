"""What a page answers where it cannot do what was asked."""

from __future__ import annotations

from typing import Any

from ..errors import GraftError

LARGE = "Too large: at most {most} MiB at a time (--upload-limit)."


class PageError(GraftError):
    """A refusal with its HTTP status, told to the user in the page's language.

    Args:
        message: a text of the catalogue, with places for `values`; or any text.
    """

    def __init__(self, status: int, message: str, /, **values: Any) -> None:
        super().__init__(message.format(**values) if values else message)
        self.status, self.message, self.values = status, message, values
