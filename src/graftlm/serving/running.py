"""A request on its way: the events of its prompts' completions, in one stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..inference.requests import Event, SamplingParams
from .answers import Choice, Piece, Token, Usage
from .errors import ApiError, of

Indexed = tuple[int, Piece]
LOWEST = -9999.0  # for the log of zero, which JSON has not; what OpenAI writes
ENDED = {"timeout": "The request took longer than it may.", "cancelled": "The request was cancelled."}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A request, ready for the engine.

    Args:
        model: as the client called it.
        adapter: the engine's name for it; "" is the base.
        prompts: token ids, one list a prompt.
        params: how tokens are chosen.
        n: completions of each prompt.
        keep: of these the likeliest so many are answered.
        session, streams: as in the engine's request.
    """

    endpoint: str
    model: str
    adapter: str
    prompts: tuple[tuple[int, ...], ...]
    params: SamplingParams
    n: int
    keep: int
    session: str = ""
    streams: bool = False


class Running:
    """Completions of several prompts, `n` each.

    Args:
        handles: the engine's, one a prompt.
        n: completions of each.
        token: makes a token of an id and a log probability.
        done: called once, at the end, with this and what went wrong, if anything did.
    """

    def __init__(
        self,
        handles: Sequence[Any],
        n: int,
        token: Callable[[int, float | None], Token],
        done: Callable[[Running, Exception | None], None],
    ) -> None:
        self.handles = handles
        self.n = n
        self.count = len(handles) * n
        self.usage = Usage()  # so far
        self.begun = time.monotonic()
        self.times: list[float] = []  # at which something came
        self.wrong: Exception | None = None
        self.ended = False  # all that was asked for has come
        self.streams = False  # its client has an answer of status 200 already
        self._token = token
        self._done: Callable[[Running, Exception | None], None] | None = done
        self._stream = self._merged()

    async def first(self) -> Indexed:
        """The first that comes; what goes wrong before it is raised here."""
        return await anext(self._stream)

    async def after(self, first: Indexed) -> AsyncIterator[Indexed]:
        """That one, and all that come behind it."""
        yield first
        async for item in self._stream:
            yield item

    async def whole(self) -> list[Choice]:
        """All choices, when they are finished."""
        choices = [Choice() for _ in range(self.count)]
        async for index, piece in self._stream:
            choices[index].add(piece)
        return choices

    def failed(self, error: Exception) -> ApiError:
        """What a client is told of an error in the midst of a stream."""
        self.wrong = error
        return of(error)

    def close(self) -> None:
        """Nobody waits for more: what is not finished is cancelled."""
        for handle in self.handles:
            handle.cancel()
        if not self.ended and self.wrong is None:
            self.wrong = ApiError(499, "The client left.", code="cancelled")
        if self._done is not None:
            done, self._done = self._done, None
            done(self, self.wrong)

    async def _merged(self) -> AsyncIterator[Indexed]:
        """Events of all prompts as they come."""
        queue: asyncio.Queue[tuple[int, Event | Exception | None]] = asyncio.Queue()

        async def drain(place: int, handle: Any) -> None:
            try:
                async for event in handle:
                    queue.put_nowait((place, event))
                queue.put_nowait((place, None))
            except Exception as error:  # told to whoever reads the stream
                queue.put_nowait((place, error))

        silent = set(range(len(self.handles)))
        tasks = [asyncio.ensure_future(drain(i, handle)) for i, handle in enumerate(self.handles)]
        try:
            left = len(tasks)
            while left:
                place, event = await queue.get()
                if event is None:
                    left -= 1
                elif isinstance(event, Exception):
                    self.wrong = event
                    raise event
                else:
                    if place in silent:
                        silent.remove(place)
                        self.usage.prompt += len(self.handles[place].request.prompt)
                    yield place * self.n + event.index, self._piece(event)
            self.ended = True
        finally:
            for task in tasks:
                task.cancel()

    def _piece(self, event: Event) -> Piece:
        now = time.monotonic()
        self.times += [now] * len(event.tokens)
        self.usage.completion += len(event.tokens)
        self.usage.cached += 0 if event.usage is None else event.usage.cached_tokens
        if event.finish in ENDED:
            status = 408 if event.finish == "timeout" else 499
            self.wrong = ApiError(status, ENDED[event.finish], code=event.finish)
            raise self.wrong
        return Piece(event.text, tuple(self._tokens(event)), event.finish)

    def _tokens(self, event: Event) -> list[Token]:
        if not event.logprobs:
            return []
        made = []
        for found in event.logprobs:
            plain = self._token(found.token, max(found.logprob, LOWEST))
            top = tuple(self._token(i, max(p, LOWEST)) for i, p in found.top.items())
            made.append(Token(plain.id, plain.text, plain.data, plain.logprob, top))
        return made
