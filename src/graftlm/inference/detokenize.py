"""Text out of tokens that come one by one: whole characters only, and nothing that may yet become a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BROKEN = "\ufffd"  # what stands in a text for bytes that are no character (yet)
LONGEST = 12  # tokens over which a character can be spread; what is broken longer stays so


class Detokenizer:
    """The text of one completion. All that `add` and `end` return is, put together, what the tokenizer makes of all tokens.

    Args:
        tokenizer: anything with transformers' `decode`.
        stop: texts that end the completion.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.stopped: str | None = None  # the stop text that was met
        self._tokens: list[int] = []
        self._held = ""  # decoded, but a stop text may begin in it
        self._from = self._to = 0  # tokens[from:to] are decoded again, for what stands between two tokens

    def add(self, token: int, heed: bool = True) -> str:
        """One token more; what of the text is certain now. `heed`: whether a stop text ends it here."""
        self._tokens.append(token)
        return self._certain(self._new(), heed)

    def end(self) -> str:
        """No more tokens; the rest of the text."""
        made = self._certain(self._beyond(), True) + self._held
        self._from = self._to = len(self._tokens)
        self._held = ""
        return made

    def _new(self) -> str:
        """What the tokens since the last whole character add; nothing while they end within one."""
        new = self._beyond()
        if not new or (new.endswith(BROKEN) and len(self._tokens) - self._to < LONGEST):
            return ""
        self._from, self._to = self._to, len(self._tokens)
        return new

    def _beyond(self) -> str:
        before = self._decoded(self._tokens[self._from : self._to])
        return self._decoded(self._tokens[self._from :])[len(before) :]

    def _decoded(self, tokens: list[int]) -> str:
        if not tokens:
            return ""
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _certain(self, new: str, heed: bool) -> str:
        """`new` and what was held back, without what is held back now, and cut before the first stop text."""
        if self.stopped is not None:
            return ""
        text, self._held = self._held + new, ""
        if not heed:
            return text
        met = [(at, stop) for stop in self.stop if (at := text.find(stop)) >= 0]
        if met:
            at, self.stopped = min(met)
            return text[:at]
        begun = max(
            (n for stop in self.stop for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])), default=0
        )
        self._held = text[len(text) - begun :]
        return text[: len(text) - begun]
