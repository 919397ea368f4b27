"""What an ingress has in an engine's place: requests go to replicas, their events come from there.

`Service` asks it what it asks an `Engine`: `submit` gives the same `Handle`. All of it lives in one event loop; threads hand
their requests over. A replica that is gone, or says nothing for `SILENCE` seconds, loses its requests: what has not streamed
yet goes to another one, at most `TRIES` times in all (it may be what the replicas die of); what has ends with an error.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from ..cluster import actor_is_lost
from ..errors import QueueFullError, ServingError
from ..inference.handle import Handle
from ..inference.health import Health
from ..inference.requests import Event, Request
from .catalogue import Entry
from .replica import News, Report, tokens_of
from .ring import spot
from .router import Ask, NoReplicaError, Place, Router

log = logging.getLogger("graftlm.serving")
SILENCE = 30.0  # seconds without a word from a replica after which it counts as gone
PATIENCE = 120.0  # seconds that a request waits for a replica where there is none
TRIES = 3  # replicas that one request may go down with
START = 64  # tokens that prompts have in common to be worth one replica's memory


@dataclass(eq=False, kw_only=True)
class Call:
    """A request on its way."""

    number: int
    handle: Handle
    ask: Ask
    until: float | None
    streamed: bool = False
    tries: int = 0
    link: Link | None = None

    @property
    def request(self) -> Request:
        return self.handle.request


@dataclass(eq=False)
class Link:
    """A replica as an ingress holds on to it."""

    name: str
    actor: Any
    calls: dict[int, Call] = field(default_factory=dict)
    report: Report | None = None
    listens: asyncio.Task | None = None


@dataclass
class Names:
    """What `Service` reads of a registry."""

    most: int
    counts: dict[str, int]


class Remote:
    """The replicas of a fleet, as one engine. Made in the event loop that it lives in.

    Args:
        limits: `rows`, `room`, `most`, `most_tokens` of a replica (see `Place`).
        entries: what a composition's names stand for, with their files sealed.
    """

    def __init__(
        self, limits: dict[str, int], entries: Callable[[str], Awaitable[Sequence[Entry]]], policy: str = "affinity"
    ) -> None:
        self.limits = limits
        self.entries = entries
        self.router = Router(policy)
        self.links: dict[str, Link] = {}
        self.id = uuid.uuid4().hex
        self.loop = asyncio.get_running_loop()
        self.waiting = 0  # requests that wait for a replica
        self.over = False
        self._numbers = itertools.count()
        self._came = asyncio.Event()
        self._tasks: set[asyncio.Task] = set()

    # -- replicas ----------------------------------------------------------------------------------------------------------
    def update(self, replicas: dict[str, tuple[Any, bool]]) -> None:
        """These are all there are: actors, and whether they take requests. Those that are left out are let go of when their
        requests have ended."""
        for name, (actor, _) in replicas.items():
            if name not in self.links:
                link = self.links[name] = Link(name, actor)
                link.listens = self.loop.create_task(self._listen(link))
        open_ = {name for name, (_, takes) in replicas.items() if takes}
        self.router.update(Place(name=name, open=name in open_, **self.limits) for name in self.links)
        for link in [link for link in self.links.values() if link.name not in replicas and not link.calls]:
            self._let_go(link)
        self._came.set()
        self._came.clear()

    async def _listen(self, link: Link) -> None:
        """Fetch what comes of one replica's requests until it is gone."""
        try:
            while link.name in self.links:
                news, report = await asyncio.wait_for(awaited(link.actor.poll.remote(self.id)), SILENCE)
                if report.error is not None:
                    raise ServingError(report.error)
                link.report = report
                self.router.holds(link.name, report.held)
                for item in news:
                    self._heard(link, item)
        except Exception as error:
            self._lost(link, error)

    def _heard(self, link: Link, news: News) -> None:
        number, what, last = news
        call = link.calls.get(number)
        if call is None:  # it was cancelled
            return
        if isinstance(what, Exception):
            if isinstance(what, QueueFullError) and not call.streamed and call.tries < TRIES:
                self._ended(call)  # another ingress was faster
                self._again(call, frozenset({link.name}))
                return
            call.handle.fail(what)
        else:
            call.handle.begun = call.handle.begun or time.monotonic()
            for event in what:
                call.streamed = True
                call.handle.put(event, event.usage is not None)
        if last:
            self._ended(call)

    def _lost(self, link: Link, error: Exception) -> None:
        """A replica is gone."""
        if self.links.pop(link.name, None) is None:
            return
        log.warning("The replica %s is gone with %s requests: %r", link.name, len(link.calls), error)
        self.router.lost(link.name)
        for call in list(link.calls.values()):
            self._ended(call)
            if call.streamed:
                call.handle.fail(ServingError("The replica that wrote this answer is gone; ask again."))
            elif call.tries >= TRIES:
                call.handle.fail(ServingError(f"{TRIES} replicas were lost one after the other with this request."))
            else:
                self._again(call, frozenset({link.name}))

    def _let_go(self, link: Link) -> None:
        self.links.pop(link.name, None)
        self.router.lost(link.name)

    # -- requests ----------------------------------------------------------------------------------------------------------
    def submit(self, request: Request) -> Handle:
        """Take a request on, from any thread. What is wrong with it, or that there is no room for it, its handle says."""
        call = Call(
            number=next(self._numbers), handle=Handle(request, self._cancel, lambda: not self.over), ask=asked(request),
            until=None if request.timeout is None else time.monotonic() + request.timeout,
        )  # fmt: skip
        self.loop.call_soon_threadsafe(self._again, call)
        return call.handle

    async def _send(self, call: Call, avoid: frozenset[str] = frozenset()) -> None:
        """Give a request to a replica; where there is none, wait for one."""
        entries = await self.entries(call.request.adapter)
        name = await self._place(call.ask, avoid)
        if call.handle.done:  # cancelled meanwhile
            self.router.finished(name, call.ask)
            return
        link = call.link = self.links[name]
        link.calls[call.number] = call
        call.tries += 1
        request = call.request
        if call.until is not None:
            request = replace(request, timeout=max(call.until - time.monotonic(), 0.001))
        link.actor.submit.remote(self.id, call.number, request, tuple(entries))

    async def _place(self, ask: Ask, avoid: frozenset[str] = frozenset()) -> str:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                return self.router.choose(ask, avoid)
            except NoReplicaError:
                left = until - time.monotonic()
                if left <= 0 or self.over:
                    raise
                if self.waiting >= self.limits["most"]:
                    raise QueueFullError(
                        f"No replica is ready, and {self.waiting} requests wait. Try again later."
                    ) from None
                avoid = frozenset()  # better there than nowhere
            self.waiting += 1
            try:
                await asyncio.wait_for(self._came.wait(), min(left, 1.0))
            except asyncio.TimeoutError:
                continue
            finally:
                self.waiting -= 1

    def _again(self, call: Call, avoid: frozenset[str] = frozenset()) -> None:
        """A request is to be sent, for the first time or because it was lost."""

        async def send() -> None:
            try:
                await self._send(call, avoid)
            except Exception as error:
                call.handle.fail(error)

        self._tasks.add(task := self.loop.create_task(send()))
        task.add_done_callback(self._tasks.discard)

    def _ended(self, call: Call) -> None:
        link, call.link = call.link, None
        if link is not None:
            link.calls.pop(call.number, None)
            self.router.finished(link.name, call.ask)

    def _cancel(self, handle: Handle) -> None:
        self.loop.call_soon_threadsafe(self._cancelled, handle)

    def _cancelled(self, handle: Handle) -> None:
        if handle.done:
            return
        for link in self.links.values():
            for call in [call for call in link.calls.values() if call.handle is handle]:
                link.actor.cancel.remote(self.id, call.number)
                self._ended(call)
        for index in range(handle.request.n):
            handle.put(Event(index=index, finish="cancelled"), index == handle.request.n - 1)

    def embed(
        self, adapter: str, rows: Sequence[Sequence[int]], pooling: str = "mean", timeout: float | None = None
    ) -> Future:
        """Vectors of token ids, as a future; see `Engine.embed`."""
        return asyncio.run_coroutine_threadsafe(self._embed(adapter, rows, pooling, timeout), self.loop)

    async def _embed(self, adapter: str, rows: Any, pooling: str, timeout: float | None) -> list[list[float]]:
        ask = Ask(adapters=tuple(n for n in adapter.split("+") if n), tokens=sum(map(len, rows)))
        entries, avoid = tuple(await self.entries(adapter)), frozenset[str]()
        for _ in range(TRIES):
            name = await self._place(ask, avoid)
            try:
                return list(await self.links[name].actor.embed.remote(adapter, entries, rows, pooling, timeout))
            except actor_is_lost():
                avoid |= {name}
            finally:
                self.router.finished(name, ask)
        raise ServingError(f"{TRIES} replicas were lost one after the other with this request.")

    # -- its life ----------------------------------------------------------------------------------------------------------
    def start(self) -> None:
        """It runs from the beginning."""

    def close(self) -> None:
        """No more is taken on; what runs ends with an error."""
        self.over = True
        for link in list(self.links.values()):
            for call in link.calls.values():
                call.handle.fail(ServingError("The server was stopped."))
            link.calls.clear()
            if link.listens is not None:
                self.loop.call_soon_threadsafe(link.listens.cancel)

    @property
    def registry(self) -> Names:
        """Counts of all replicas."""
        loads = sum(link.report.loads for link in self.links.values() if link.report is not None)
        return Names(self.limits["room"] * max(len(self.links), 1), {"loaded": loads, "failed": 0, "evicted": 0})

    @property
    def held(self) -> set[str]:
        """Adapters that some replica has attached."""
        return {name for link in list(self.links.values()) if link.report is not None for name in link.report.held}

    def health(self) -> Health:
        """How all of it does."""
        links = list(self.links.values())
        calls = [call for link in links for call in list(link.calls.values())]
        begun = [call for call in calls if call.handle.begun is not None]
        caches = [link.report.cache for link in links if link.report is not None]
        ready = any(place.open for place in self.router.places.values())
        return Health(
            alive=ready and not self.over, error=None if ready else "no replica is ready", silent=0.0,
            waiting=self.waiting + len(calls) - len(begun), running=len(begun), cache_usage=max(caches, default=0.0),
            adapters=(), running_adapters=names(begun), waiting_adapters=names([c for c in calls if c not in begun]),
        )  # fmt: skip


def names(calls: Sequence[Call]) -> tuple[str, ...]:
    return tuple(sorted({name for call in calls for name in call.ask.adapters}))


def asked(request: Request) -> Ask:
    """What the router is told of a request: its session, or its prompt's start where that is long enough to be shared."""
    key: str | int | None = request.session or None
    if key is None and len(request.prompt) > START:
        key = spot(str(request.prompt[:START]))
    adapters = tuple(name for name in request.adapter.split("+") if name)
    return Ask(adapters=adapters, key=key, tokens=tokens_of(request))


async def awaited(reference: Any) -> Any:
    """A Ray object, as a coroutine."""
    return await reference
