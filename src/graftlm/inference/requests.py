"""What is asked of a server, and what it answers: plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError
from .text import Sampling

FORMATS = {"text": None, "json_object": None, "json_schema": "schema", "regex": "pattern", "grammar": "grammar"}


@dataclass(frozen=True, kw_only=True)
class SamplingParams(Sampling):
    """How tokens are chosen and when to stop, request by request. In this order: bias, penalties, `min_new_tokens`, format;
    temperature, `top_k`, `top_p`, `min_p`.

    Args:
        top_k: samples from so many of the likeliest tokens; 0: from all.
        min_p: samples from tokens that have this share of the likeliest one's probability.
        presence_penalty: taken off the logits of tokens that have been written.
        frequency_penalty: the same, as often as they have been.
        logit_bias: added to logits, by token id.
        stop_ids: tokens that end a completion, beside the model's own.
        ignore_end: the model's own end tokens end nothing.
        min_new_tokens: until then no end token is chosen, and no stop text heeded.
        logprobs: log probabilities of each token and of so many of the likeliest ones, of the model's own distribution;
            None: none.
        response_format: what the completion must be: {"type": "json_object"}, {"type": "json_schema", "schema": {…}},
            {"type": "regex", "pattern": "…"} or {"type": "grammar", "grammar": "…"} (Lark's form); "text" is anything.

    Raises:
        ConfigError: a value out of its range.
    """

    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()
    ignore_end: bool = False
    min_new_tokens: int = 0
    logprobs: int | None = None
    response_format: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        finite = all(math.isfinite(v) for v in (self.temperature, self.presence_penalty, self.frequency_penalty))
        limits = {
            "top_k": (self.top_k >= 0, "0 (all) or above"),
            "min_p": (0 <= self.min_p <= 1, "0 to 1"),
            "temperature": (finite, "a finite number, as presence_penalty and frequency_penalty"),
            "logit_bias": (all(math.isfinite(v) for v in self.logit_bias.values()), "finite numbers by token id"),
            "min_new_tokens": (0 <= self.min_new_tokens <= self.max_new_tokens, "0 to max_new_tokens"),
            "logprobs": (self.logprobs is None or 0 <= self.logprobs <= 100, "0 to 100"),
        }
        for name, (fine, expected) in limits.items():
            if not fine:
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected {expected}.")
        self._check_format()

    def _check_format(self) -> None:
        form = self.response_format
        if form is None:
            return
        kind = form.get("type") if isinstance(form, Mapping) else None
        needed = FORMATS.get(kind) if isinstance(kind, str) else None
        if kind not in FORMATS or set(form) - {"type", needed} or (needed and needed not in form):
            shapes = ", ".join(f"{{'type': {k!r}{f', {v!r}: …' if v else ''}}}" for k, v in FORMATS.items())
            raise ConfigError(f"response_format={form!r}: expected one of {shapes}.")

    @property
    def formatted(self) -> bool:
        """Whether the completion must be of some form."""
        return self.response_format is not None and self.response_format["type"] != "text"


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and what is wanted of it.

    Args:
        prompt: token ids, at least one.
        adapter: "name", a composition "style+task", or "" for the base.
        params: how tokens are chosen.
        n: completions; the i-th is that of `seed + i` by itself.
        timeout: seconds after which it is given up.
        session: what it belongs to; a fleet sends a session's requests to one replica.
        streams: somebody reads its events as they come, so that it cannot begin anew elsewhere.
    """

    prompt: tuple[int, ...]
    adapter: str = ""
    params: SamplingParams = field(default_factory=SamplingParams)
    n: int = 1
    timeout: float | None = None
    session: str = ""
    streams: bool = False


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """A token's log probability, and the likeliest tokens' at its place, by id."""

    token: int
    logprob: float
    top: Mapping[int, float]


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of a request: of its prompt, of these those that were not computed anew, and of all completions."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, kw_only=True)
class Event:
    """What is new of a completion.

    Args:
        index: which of the request's `n`.
        tokens: ids, an end token included.
        text: what they add to the text: whole characters only, and nothing that may yet become a stop text.
        logprobs: one a token, where they are asked for.
        finish: why it ends here: "stop" (an end token, a stop text or the end of its form), "length", "timeout" or
            "cancelled"; None: it goes on.
        usage: with the request's last event.
    """

    index: int
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: str | None = None
    usage: Usage | None = None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One whole completion."""

    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...]
    finish: str


@dataclass(frozen=True, kw_only=True)
class Result:
    """A whole request."""

    completions: tuple[Completion, ...]
    usage: Usage
