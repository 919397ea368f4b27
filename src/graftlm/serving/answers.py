"""Answers in OpenAI's form, whole and in pieces.

pieces of a choice: text and tokens as they come, the last with why it ended   → chunks (server-sent events)
a choice: all its pieces joined                                                → one body
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .tools import Call, may_be_call, read_calls


@dataclass(frozen=True)
class Token:
    """A token that was written: id, text, bytes, its log probability, and the likeliest ones with theirs."""

    id: int
    text: str
    data: bytes
    logprob: float | None = None
    top: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Piece:
    """What came of a choice: text that is surely part of the answer, its tokens, and why it ended if it did."""

    text: str
    tokens: tuple[Token, ...] = ()
    finish: str | None = None


@dataclass
class Usage:
    """Tokens of a request."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass
class Choice:
    """One answer, as far as it has come."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None
    sent: int = 0  # of the text, in chunks

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.finish = piece.finish or self.finish

    @property
    def mean_logprob(self) -> float:
        """By which the best of several is told."""
        found = [t.logprob for t in self.tokens if t.logprob is not None]
        return sum(found) / max(len(found), 1)


class Form:
    """How answers of one request look. A subclass has `kind`, `prefix`, `whole_choice` and `delta`."""

    kind: str
    prefix: str

    def __init__(self, model: str, logprobs: bool) -> None:
        self.model = model
        self.logprobs = logprobs
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        made = [self.whole_choice(i, choice) for i, choice in enumerate(choices)]
        return self._head(self.kind) | {"choices": made, "usage": usage.to_dict()}

    def whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        raise NotImplementedError

    def begin(self, choices: int) -> list[dict[str, Any]]:
        """Chunks before anything has come."""
        return []

    def delta(self, index: int, choice: Choice, piece: Piece) -> list[dict[str, Any]]:
        """Chunks for a piece that has been added to its choice."""
        raise NotImplementedError

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The last chunk where it is asked for."""
        return self._head(self.chunk_kind) | {"choices": [], "usage": usage.to_dict()}

    @property
    def chunk_kind(self) -> str:
        return self.kind

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "system_fingerprint": None}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return self._head(self.chunk_kind) | {"choices": [choice]}


class TextForm(Form):
    """/v1/completions."""

    kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, model: str, logprobs: bool, echoed: Sequence[str] = (), each: int = 1) -> None:
        super().__init__(model, logprobs)
        self.echoed = echoed  # by prompt; each prompt has `each` choices
        self.each = each

    def _echo(self, index: int) -> str:
        return self.echoed[index // self.each] if self.echoed else ""

    def whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        start = self._echo(index)
        return self._choice(index, start + choice.text, choice.tokens, choice.finish, len(start))

    def delta(self, index: int, choice: Choice, piece: Piece) -> list[dict[str, Any]]:
        start = "" if choice.sent else self._echo(index)
        offset = choice.sent + len(start)
        choice.sent = offset + len(piece.text)
        if not (start or piece.text or piece.tokens or piece.finish):
            return []
        return [self._chunk(self._choice(index, start + piece.text, piece.tokens, piece.finish, offset))]

    def _choice(self, index: int, text: str, tokens: Sequence[Token], finish: str | None, offset: int) -> dict[str, Any]:
        probs = None
        if self.logprobs:
            places = []
            for token in tokens:
                places.append(offset)
                offset += len(token.text)
            probs = {
                "tokens": [t.text for t in tokens],
                "token_logprobs": [t.logprob for t in tokens],
                "top_logprobs": [{u.text: u.logprob for u in t.top} for t in tokens],
                "text_offset": places,
            }
        return {"index": index, "text": text, "logprobs": probs, "finish_reason": finish}


class ChatForm(Form):
    """/v1/chat/completions.

    Args:
        tools: names of the functions that may be called; calls in the text are told apart from it.
        calls: of which so many at most are answered; None: all.
    """

    kind = "chat.completion"
    prefix = "chatcmpl"

    def __init__(self, model: str, logprobs: bool, tools: Sequence[str] = (), calls: int | None = None) -> None:
        super().__init__(model, logprobs)
        self.tools = tools
        self.calls = calls

    @property
    def chunk_kind(self) -> str:
        return "chat.completion.chunk"

    def whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        text, calls = read_calls(choice.text, self.tools, self.calls) if self.tools else (choice.text, [])
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
        if calls:
            message["tool_calls"] = [call.to_dict() for call in calls]
        return {
            "index": index,
            "message": message,
            "logprobs": self._probs(choice.tokens),
            "finish_reason": "tool_calls" if calls and choice.finish == "stop" else choice.finish,
        }

    def begin(self, choices: int) -> list[dict[str, Any]]:
        return [self._part(i, {"role": "assistant", "content": ""}, None, None) for i in range(choices)]

    def delta(self, index: int, choice: Choice, piece: Piece) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = []
        calls: list[Call] = []
        finish, until = piece.finish, len(choice.text)
        if self.tools:
            until = may_be_call(choice.text)
            if finish:
                _, calls = read_calls(choice.text, self.tools, self.calls)
                until = max(until, choice.sent) if calls else len(choice.text)
                finish = "tool_calls" if calls and finish == "stop" else finish
        text = choice.text[choice.sent : until]
        choice.sent = max(choice.sent, until)
        if text or (self.logprobs and piece.tokens):
            made.append(self._part(index, {"content": text}, None, self._probs(piece.tokens)))
        if calls:
            made.append(self._part(index, {"tool_calls": [c.to_dict(i) for i, c in enumerate(calls)]}, None, None))
        if finish:
            made.append(self._part(index, {}, finish, None))
        return made

    def _part(self, index: int, delta: dict[str, Any], finish: str | None, probs: Any) -> dict[str, Any]:
        return self._chunk({"index": index, "delta": delta, "logprobs": probs, "finish_reason": finish})

    def _probs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        return {"content": [_spelled(t) | {"top_logprobs": [_spelled(u) for u in t.top]} for t in tokens], "refusal": None}


def _spelled(token: Token) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.data)}


def event(data: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + (data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)).encode() + b"\n\n"
