"""One replica: an engine in a process of its own, asked by ingresses; it runs as a Ray actor.

    an ingress    submit(id, request, entries) ─→ the engine         poll() ←─ what has come since, of all its requests

Events are fetched, not sent: one call brings what has gathered for an ingress since its last one, so that a step of many
rows costs one message. What does not stream is told when it has ended, in one piece.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import GraftError, ServingError
from ..inference.requests import Event, Request
from .catalogue import Entry, digest_of, put_files
from .config import FleetConfig
from .handle import manager

News = tuple[int, "Sequence[Event] | Exception", bool]  # a request's number, what has come of it, whether that is all
GATHERS = 0.001  # seconds in which the other rows' events of a step come, too
LISTENS = 1.0  # seconds after which a poll returns that brings nothing
FORGET = 60.0  # seconds without a poll after which an ingress is gone, and its requests with it


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What an ingress needs to know of the base.

    Args:
        limit: tokens of a prompt and its answer.
        width: of a hidden state.
        versions: see `cluster.versions`.
        fingerprint: of the base's values.
    """

    tokenizer: Any
    vocabulary: int
    limit: int
    width: int
    versions: dict[str, str]
    fingerprint: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """How a replica does.

    Args:
        held: adapters that are attached, used last at the end.
        requests, tokens: that are there: those that wait and those that run.
        loads: adapters read since the start.
        error: why it serves nothing any more.
    """

    held: tuple[str, ...]
    requests: int
    tokens: int
    loads: int
    cache: float
    error: str | None


@dataclass
class Box:
    """What has come for one ingress."""

    news: list[News] = field(default_factory=list)
    filled: asyncio.Event = field(default_factory=asyncio.Event)
    asked: float = field(default_factory=time.monotonic)
    running: dict[int, bool] = field(default_factory=dict)  # by request, whether anybody wants it still
    handles: dict[int, Any] = field(default_factory=dict)

    def put(self, number: int, what: Sequence[Event] | Exception, last: bool) -> None:
        self.news.append((number, what, last))
        self.filled.set()


class Replica:
    """An engine over a base, loaded here.

    Args:
        values: a `FleetConfig`, as plain values.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self.config = FleetConfig.from_dict(values)
        self.engine: Any = None
        self.known: dict[str, int] = {}  # numbers of the entries that names stand for here
        self.locks: dict[str, asyncio.Lock] = {}
        self.boxes: dict[str, Box] = {}
        self.tokens = 0
        self._facts: Facts | None = None
        self._store: tempfile.TemporaryDirectory | None = None

    async def facts(self) -> Facts:
        """The base is loaded here, at the first call, and tried out.

        Raises:
            GraftError: it cannot be.
        """
        if self._facts is None:
            try:
                self._facts = await asyncio.to_thread(self._load)
            except Exception as error:
                raise told(error) from None
        return self._facts

    def _load(self) -> Facts:
        import torch

        from .. import fingerprint
        from ..cluster import versions
        from ..inference.threads import apart
        from ..serving.start import engine_for, without_adapters
        from ..training.bases import resolve_base

        c = self.config
        torch.set_num_threads(c.replica.threads)
        base, tokenizer = apart(lambda: resolve_base(c.base, quantization=c.quantization))
        limits = c.replica.engine(c.http.max_choices)
        self.engine = engine = apart(lambda: engine_for(without_adapters(base), tokenizer, limits))
        engine.start()
        engine.ready("").result()
        width = int(engine.model.get_input_embeddings().weight.shape[1])
        return Facts(
            tokenizer=tokenizer, vocabulary=engine.stepping.vocabulary, limit=engine.limit, width=width,
            versions=versions(), fingerprint=fingerprint.of(base),
        )  # fmt: skip

    async def report(self) -> Report:
        """How it does; ingresses that ask no more are forgotten."""
        late = time.monotonic() - FORGET
        for name in [n for n, box in self.boxes.items() if box.asked < late]:
            for handle in self.boxes.pop(name).handles.values():
                handle.cancel()
        health, registry = self.engine.health(), self.engine.registry
        live = sorted(registry.live, key=lambda version: version.used)
        wrong = health.error or (None if health.alive else "it was stopped")
        return Report(
            held=tuple(version.name for version in live if not version.retired), tokens=self.tokens,
            requests=sum(len(box.running) for box in self.boxes.values()), loads=registry.counts["loaded"],
            cache=health.cache_usage, error=wrong or ("it is stuck" if health.silent > 120 else None),
        )  # fmt: skip

    # -- requests ----------------------------------------------------------------------------------------------------------
    async def submit(self, ingress: str, number: int, request: Request, entries: Sequence[Entry]) -> None:
        """Take a request on; what comes of it, errors too, is for `poll`."""
        box = self.boxes.setdefault(ingress, Box())
        box.running[number] = True
        tokens = tokens_of(request)
        self.tokens += tokens
        try:
            await self._run(box, number, request, entries)
        except Exception as error:  # whatever it is, it is the asker's
            box.put(number, told(error), True)
        finally:
            self.tokens -= tokens
            box.running.pop(number, None)
            box.handles.pop(number, None)

    async def _run(self, box: Box, number: int, request: Request, entries: Sequence[Entry]) -> None:
        await self._have(entries)
        if not box.running[number]:
            return
        handle = box.handles[number] = await asyncio.to_thread(self.engine.submit, request)
        if not box.running[number]:
            handle.cancel()
        events = []
        async for event in handle:
            if request.streams:
                box.put(number, (event,), False)
            else:
                events.append(event)
        box.put(number, events, True)

    async def poll(self, ingress: str) -> tuple[list[News], Report]:
        """What has come for an ingress since its last call; after a second also nothing."""
        box = self.boxes.setdefault(ingress, Box())
        box.asked = time.monotonic()
        if not box.news:
            box.filled.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(box.filled.wait(), LISTENS)
                await asyncio.sleep(GATHERS)
        news, box.news = box.news, []
        box.asked = time.monotonic()
        return news, await self.report()

    async def cancel(self, ingress: str, number: int) -> None:
        """Nobody wants it any more."""
        box = self.boxes.get(ingress)
        if box is not None and number in box.running:
            box.running[number] = False
            if (handle := box.handles.get(number)) is not None:
                handle.cancel()

    async def embed(
        self, adapter: str, entries: Sequence[Entry], rows: Sequence[Sequence[int]], pooling: str, timeout: float | None
    ) -> list[list[float]]:
        """Vectors of token ids; see `Engine.embed`."""
        try:
            await self._have(entries)
            return await asyncio.wrap_future(self.engine.embed(adapter, rows, pooling, timeout))
        except Exception as error:
            raise told(error) from None

    # -- adapters ----------------------------------------------------------------------------------------------------------
    async def load(self, entry: Entry) -> None:
        """Have an adapter read, attached and tried out.

        Raises:
            GraftError: it cannot be.
        """
        try:
            await self._have((entry,))
            await asyncio.wrap_future(self.engine.ready(entry.name))
        except Exception as error:
            raise told(error) from None

    async def try_out(self, entry: Entry) -> None:
        """Whether an adapter can be served, under a name of its own, which is forgotten.

        Raises:
            GraftError: it cannot be.
        """
        trial = replace(entry, name=f"{entry.name}#{entry.number}")
        try:
            await self.load(trial)
        finally:
            self.known.pop(trial.name, None)
            if trial.name in self.engine.registry.names:
                self.engine.unload(trial.name)

    async def _have(self, entries: Sequence[Entry]) -> None:
        """Let names stand for these, or for what is newer."""
        for entry in entries:
            async with self.locks.setdefault(entry.name, asyncio.Lock()):
                if self.known.get(entry.name, -1) >= entry.number:
                    continue
                folder = await self._folder(entry)
                if entry.name in self.engine.registry.names:
                    await asyncio.wrap_future(self.engine.load(entry.name, folder, entry.pinned))
                else:
                    self.engine.registry.add(entry.name, folder, entry.pinned)
                self.known[entry.name] = entry.number

    async def _folder(self, entry: Entry) -> Path:
        """Where an entry's files are on this machine; they are fetched where they are not."""
        if Path(entry.folder).is_dir():
            return Path(entry.folder)
        if self._store is None:
            self._store = tempfile.TemporaryDirectory(prefix="graftlm-replica-")
        folder = Path(self._store.name) / entry.digest
        if not folder.is_dir():
            files = await manager().files.remote(entry.digest)
            if digest_of(files) != entry.digest:
                raise ServingError(f"The files of the adapter {entry.name!r} came here changed.")
            await asyncio.to_thread(put_files, folder, files)
        return folder


def tokens_of(request: Request) -> int:
    """What a request takes at most."""
    return len(request.prompt) + request.n * request.params.max_new_tokens


def told(error: Exception) -> Exception:
    """An error as it can travel: ours as they are, but for what caused them; others as a line."""
    if isinstance(error, GraftError):
        return type(error)(str(error))
    return ServingError(f"A replica failed: {error!r}")
