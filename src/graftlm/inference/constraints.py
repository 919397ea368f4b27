"""Completions of a form (JSON, a JSON schema, a regular expression, a grammar), by llguidance, which comes with the extra
`serve`: which tokens may come next."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, UnsupportedError

LONGEST = 131_072  # characters of a schema, pattern or grammar


class Constraint:
    """Where one completion stands in its form."""

    def __init__(self, matcher: Any, vocabulary: int, ends: Sequence[int]) -> None:
        self.matcher = matcher
        self.ends = list(ends)
        self.words = torch.zeros(-(-vocabulary // 32), dtype=torch.int32)  # a bit a token

    @property
    def complete(self) -> bool:
        """Whether nothing can follow."""
        return bool(self.matcher.is_stopped())

    def mask(self, logits: Tensor) -> None:
        """Set the logits [V] of tokens that may not come next to minus infinity, in place."""
        self.words.zero_()
        self.matcher.unsafe_compute_mask_ptr(self.words.data_ptr(), self.words.numel() * 4)
        if error := self.matcher.get_error():
            raise UnsupportedError(f"response_format: {error}")
        bits = (self.words[:, None] >> torch.arange(32, dtype=torch.int32)) & 1
        allowed = bits.flatten()[: logits.shape[0]].bool()
        if self.matcher.is_accepting():
            allowed[[e for e in self.ends if e < len(allowed)]] = True
        logits[: len(allowed)].masked_fill_(~allowed.to(logits.device), -torch.inf)
        logits[len(allowed) :] = -torch.inf

    def took(self, token: int) -> None:
        """A token was chosen, out of those that may."""
        if token not in self.ends:
            self.matcher.consume_token(token)
            if error := self.matcher.get_error():
                raise UnsupportedError(f"response_format: {error}")


class Constraints:
    """Makes constraints for a tokenizer, which is read at the first one. Forms are compiled by whoever asks, in its thread.

    Args:
        tokenizer: of the `tokenizers` library (a "fast" one).
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._read: Any = None
        self._lock = threading.Lock()

    def of(self, form: Mapping[str, Any], ends: Sequence[int], n: int = 1) -> list[Constraint]:
        """The constraint of a `response_format`, for each of `n` completions.

        Raises:
            ConfigError: a schema, pattern or grammar that cannot be read.
            UnsupportedError: llguidance is not installed, or the tokenizer is not one that it reads.
        """
        try:
            from llguidance import LLMatcher
        except ImportError as reason:
            raise UnsupportedError("response_format needs llguidance: pip install 'graftlm[serve]'.") from reason
        tokens = self._tokens()
        kind, error = form["type"], ""
        try:
            given = form.get({"regex": "pattern", "grammar": "grammar"}.get(kind, "schema"), {"type": "object"})
            text = given if isinstance(given, str) else json.dumps(given)
            if len(text) > LONGEST:
                raise ValueError(f"it has {len(text)} characters, at most {LONGEST} are taken")
            made_by = {"regex": LLMatcher.grammar_from_regex, "grammar": LLMatcher.grammar_from_lark}
            matcher = LLMatcher(tokens, made_by.get(kind, LLMatcher.grammar_from_json_schema)(text))
            error = matcher.get_error()
        except (ValueError, TypeError, RuntimeError) as reason:
            error = str(reason)
        if error:
            raise ConfigError(f"response_format of type {kind!r} cannot be used: {error}")
        matchers = [matcher, *(matcher.deep_copy() for _ in range(n - 1))]
        return [Constraint(m, tokens.vocab_size, ends) for m in matchers]

    def _tokens(self) -> Any:
        if getattr(self.tokenizer, "backend_tokenizer", None) is None:
            raise UnsupportedError(
                f"response_format needs a tokenizer of the tokenizers library; got {type(self.tokenizer).__name__}."
            )
        with self._lock:
            if self._read is None:
                from llguidance.hf import from_tokenizer

                self._read = from_tokenizer(self.tokenizer)
            return self._read
