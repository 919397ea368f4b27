"""A request on its way, as its owner sees it: a stream of events, for threads and for asyncio alike."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator

from ..errors import ServingError
from .requests import Completion, Event, Request, Result, TokenLogprob, Usage


class Handle:
    """Iterate over it (`for` or `async for`, one at a time) for its events, or ask for the whole `result`.

    Args:
        cancelling: how it is cancelled.
        alive: whether the engine still runs; a wait ends when it does not.
    """

    PATIENCE = 1.0  # seconds between two looks at whether the engine is alive

    def __init__(self, request: Request, cancelling: Callable[[Handle], None], alive: Callable[[], bool]) -> None:
        self.request = request
        self.begun: float | None = None  # by time.monotonic, when it waited no more
        self._cancelling = cancelling
        self._alive = alive
        self._events: deque[Event] = deque()
        self._error: Exception | None = None
        self._over = False  # no event comes any more
        self._changed = threading.Condition()
        self._listeners: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    @property
    def done(self) -> bool:
        """Whether all that there will be is there."""
        return self._over

    def cancel(self) -> None:
        """Nobody wants it any more: it leaves the batch within one step, and its stream ends with "cancelled"."""
        if not self._over:
            self._cancelling(self)

    # -- the engine's side -----------------------------------------------------------------------------------------------
    def put(self, event: Event, last: bool = False) -> None:
        """One event more."""
        with self._changed:
            if not self._over:
                self._events.append(event)
                self._over = last
                self._tell()

    def fail(self, error: Exception) -> None:
        """It ends with an error, after the events that came before."""
        with self._changed:
            if not self._over:
                self._error, self._over = error, True
                self._tell()

    def _tell(self) -> None:
        self._changed.notify_all()
        for loop, event in self._listeners:
            if not loop.is_closed():
                loop.call_soon_threadsafe(event.set)

    # -- its owner's side ------------------------------------------------------------------------------------------------
    def __iter__(self) -> Iterator[Event]:
        while True:
            with self._changed:
                while not self._events and not self._over:
                    self._changed.wait(self.PATIENCE)
                    self._look()
                event = self._next()
            if event is None:
                return
            yield event

    async def __aiter__(self) -> AsyncIterator[Event]:
        listener = asyncio.get_running_loop(), asyncio.Event()
        with self._changed:
            self._listeners.append(listener)
        try:
            while True:
                with self._changed:
                    listener[1].clear()
                    waits = not self._events and not self._over
                    event = None if waits else self._next()
                if waits:
                    try:
                        await asyncio.wait_for(listener[1].wait(), self.PATIENCE)
                    except asyncio.TimeoutError:
                        with self._changed:
                            self._look()
                elif event is None:
                    return
                else:
                    yield event
        finally:
            with self._changed:
                self._listeners.remove(listener)

    def result(self) -> Result:
        """Wait for all of it.

        Raises:
            GraftError: it failed.
        """
        return whole(self.request.n, list(self))

    async def aresult(self) -> Result:
        """The same for asyncio."""
        return whole(self.request.n, [event async for event in self])

    def _next(self) -> Event | None:
        """The first event that has not been given; None where there is no more."""
        if self._events:
            return self._events.popleft()
        if self._error is not None:
            raise self._error
        return None

    def _look(self) -> None:
        """A dead engine says nothing: then this does."""
        if not self._over and not self._events and not self._alive():
            self._error, self._over = ServingError("The engine does not run any more."), True


def whole(n: int, events: list[Event]) -> Result:
    """Events put together."""
    tokens: list[list[int]] = [[] for _ in range(n)]
    texts: list[list[str]] = [[] for _ in range(n)]
    logprobs: list[list[TokenLogprob]] = [[] for _ in range(n)]
    finish, usage = [""] * n, Usage(prompt_tokens=0, cached_tokens=0, completion_tokens=0)
    for event in events:
        tokens[event.index] += event.tokens
        texts[event.index].append(event.text)
        logprobs[event.index] += event.logprobs
        finish[event.index] = event.finish or finish[event.index]
        usage = event.usage or usage
    made = (
        Completion(tokens=tuple(tokens[i]), text="".join(texts[i]), logprobs=tuple(logprobs[i]), finish=finish[i])
        for i in range(n)
    )
    return Result(completions=tuple(made), usage=usage)
