"""Requests inside the engine: what is written of each completion, and when it ends."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..passes.plain_cache import FrontMemory
from ..routing import Group
from .constraints import Constraint
from .detokenize import Detokenizer
from .handle import Handle
from .registry import Version
from .requests import Event, TokenLogprob, Usage
from .sampling import Chooser
from .scheduler import Sequence as Tokens


@dataclass(frozen=True, eq=False, kw_only=True)
class Composition:
    """Adapters that requests go through together.

    Args:
        group: their names in the model.
        acting: of these, the ones that still act once their front is in the cache.
        digest: of all that they compute.
    """

    versions: tuple[Version, ...]
    group: Group
    acting: Group
    digest: Hashable
    front: FrontMemory


@dataclass(eq=False, kw_only=True)
class Job:
    """One request.

    Attributes:
        handle: its owner's.
        versions: the adapters that it asked for, as they were when it came.
        composition: the same, attached; None before.
        invoked: from which token on an adapter that waits for its invocation there acts, too, and the composition with it;
            `composition` is without it then.
        writings: its completions that are on their way.
        later: of these, those that wait for the first one's prompt.
        constraints: one a completion where the request has a form; taken by its writings.
    """

    handle: Handle
    versions: tuple[Version, ...]
    deadline: float | None
    constraints: list[Constraint] = field(default_factory=list)
    composition: Composition | None = None
    invoked: tuple[int, Composition] | None = None
    writings: list[Writing] = field(default_factory=list)
    later: list[Writing] = field(default_factory=list)
    started: bool = False  # counted as waiting no more
    over: int = 0  # completions that have ended
    written: int = 0
    cached: int = 0

    @property
    def shared(self) -> int | None:
        """How many tokens at the start of a row may be shared through `composition`; None for all."""
        return None if self.invoked is None else self.invoked[0]

    def put(self, event: dict[str, Any]) -> None:
        """An event of one of its completions; the last one of all comes with the usage."""
        self.over += event.get("finish") is not None
        self.written += len(event.get("tokens", ()))
        last = self.over == self.handle.request.n
        if last:
            prompt = len(self.handle.request.prompt)
            event["usage"] = Usage(prompt_tokens=prompt, cached_tokens=self.cached, completion_tokens=self.written)
        self.handle.put(Event(**event), last)


class Writing:
    """One completion of a request.

    Args:
        tokens: its prompt, and what it has written, as the scheduler knows it.
        ends: tokens that end it.
        text: turns its tokens into text; None where there is no tokenizer.
    """

    def __init__(
        self, job: Job, index: int, tokens: Tokens, chooser: Chooser, ends: Sequence[int], text: Detokenizer | None
    ) -> None:
        self.job = job
        self.index = index
        self.tokens = tokens
        self.chooser = chooser
        self.ends = frozenset(ends)
        self.text = text
        self.count = 0

    def took(self, token: int, logprob: TokenLogprob | None) -> bool:
        """The model wrote a token; whether that was the last one."""
        self.count += 1
        self.tokens.tokens.append(token)
        p = self.job.handle.request.params
        text, finish = "", None
        if token in self.ends:
            finish = "stop"
        else:
            text = self.text.add(token, self.count >= p.min_new_tokens) if self.text is not None else ""
            if (
                self.text is not None
                and self.text.stopped is not None
                or self.chooser.constraint is not None
                and self.chooser.constraint.complete
            ):
                finish = "stop"
            elif self.count == p.max_new_tokens:
                finish = "length"
        if finish is not None and self.text is not None:
            text += self.text.end()
        self.job.put({
            "index": self.index, "tokens": (token,), "text": text, "finish": finish,
            "logprobs": () if logprob is None else (logprob,),
        })  # fmt: skip
        return finish is not None

    def end(self, finish: str) -> None:
        """It ends before its time."""
        self.job.put({"index": self.index, "text": "" if self.text is None else self.text.end(), "finish": finish})
