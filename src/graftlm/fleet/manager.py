"""The fleet's one manager: replicas, adapters, and the table of both that ingresses follow; a deployment of Serve.

It carries no request: while it is away, what there is goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..cluster import as_there, differences, versions
from ..errors import AdapterError, ConfigError, GraftError, ServingError
from .catalogue import Catalogue, Entry
from .config import FleetConfig
from .control import STARTS, Action, Control, Member, Scaler
from .remote import SILENCE, awaited
from .replica import Facts, Replica

log = logging.getLogger("graftlm.serving")
TICK = 0.5  # seconds between two looks at the replicas
HOLDS = 10.0  # seconds after which a watch returns that brings nothing
START = 1800.0  # seconds that a replica may take to start


@dataclass(frozen=True, kw_only=True)
class Table:
    """What ingresses follow.

    Args:
        manager: which one it is of; numbers of another one say nothing.
        replicas: actors by name, and whether they take requests.
        entries: those that have changed; `number` is the highest.
        draining: no requests are taken any more.
    """

    manager: str
    version: int
    number: int
    values: dict[str, Any]
    replicas: dict[str, tuple[Any, bool]]
    entries: list[Entry]
    draining: bool


class Manager:
    """Replicas and adapters of one fleet."""

    def __init__(self) -> None:
        self.id = uuid.uuid4().hex
        self.control = Control()
        self.actors: dict[str, Any] = {}
        self.config = FleetConfig()
        self.catalogue = Catalogue(self.config.base_name)
        self.scaler = Scaler(1, 1, 1, 0, 0)
        self.facts_: Facts | None = None
        self.wanted = 0
        self.version = 0
        self.error = ""
        self.draining = False
        self._loading: set[asyncio.Task] = set()
        self._turns: asyncio.Task | None = None
        self._news = asyncio.Event()

    # -- what Serve and clients ask ----------------------------------------------------------------------------------------
    async def reconfigure(self, values: dict[str, Any]) -> None:
        """The configuration, at the start and when it changes: replicas are replaced where they would compute otherwise.

        Raises:
            ConfigError: what cannot change while it runs.
        """
        config, before = FleetConfig.from_dict(values), self.config
        if self._turns is not None:
            fixed = ("host", "port", "ingress", "api_keys", "admin_key", "max_body")
            changed = [f"http.{n}" for n in fixed if getattr(config.http, n) != getattr(before.http, n)]
            changed += [n for n in ("base", "name") if getattr(config, n) != getattr(before, n)]
            if changed:
                raise ConfigError(
                    f"{', '.join(changed)} cannot change while the fleet runs: graftlm deploy --stop it first."
                )
        else:
            self.catalogue = Catalogue(config.base_name)
        await asyncio.to_thread(self.catalogue.configure, config.adapters, config.adapter_dirs)
        if self._turns is None or config.computes != before.computes:
            self.control.renew()
            self.error = ""
        r = config.replicas
        self.control.grace = r.grace
        self.scaler = Scaler(r.min, r.most, r.queued_tokens, r.up_after, r.down_after)
        self.config = config
        self._tell()
        if self._turns is None:
            self._turns = asyncio.get_running_loop().create_task(self._look_after())

    async def facts(self) -> Facts:
        """Of the base, as soon as a replica is ready. ServingError where none starts."""
        while self.facts_ is None:
            if self.control.failed >= STARTS:
                raise ServingError(self.error)
            await asyncio.sleep(0.1)
        return self.facts_

    async def watch(self, manager: str, version: int, number: int) -> Table:
        """The table, as soon as it is another than the one of this version; after a while also the same one."""
        if (manager, version) == (self.id, self.version):
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._news.wait(), HOLDS)
        seen = [m for m in self.control.members.values() if m.state != "starting"]
        return Table(
            manager=self.id, version=self.version, number=self.catalogue.number, draining=self.draining,
            values=self.config.model_dump(), entries=self.catalogue.changed(number if manager == self.id else 0),
            replicas={m.name: (self.actors[m.name], m.state == "ready") for m in seen},
        )  # fmt: skip

    async def status(self) -> dict[str, Any]:
        """For people and probes."""
        members = self.control.members.values()
        return {
            "generation": self.control.generation, "wanted": self.wanted, "error": self.error,
            "replicas": {m.name: {"state": m.state, "generation": m.generation, "tokens": m.tokens} for m in members},
            "adapters": sum(not e.gone for e in self.catalogue.entries.values()),
        }  # fmt: skip

    async def drain(self) -> None:
        """Take no more requests."""
        self.draining = True
        self._tell()

    # -- adapters ----------------------------------------------------------------------------------------------------------
    async def look(self, number: int) -> list[Entry]:
        """Find folders that are new; what has changed since a number."""
        await asyncio.to_thread(self.catalogue.look)
        return self.catalogue.changed(number)

    async def seal(self, name: str) -> Entry:
        """A name's entry, with its files copied."""
        return await asyncio.to_thread(self.catalogue.seal, name)

    async def files(self, digest: str) -> dict[str, bytes]:
        """The files of a sealed entry, for machines that do not see them."""
        return await asyncio.to_thread(self.catalogue.files, digest)

    async def load(self, name: str, path: str, pinned: bool, inplace: bool) -> None:
        """Let a name stand for a folder, which one replica has tried out; all others read it at its first request there.

        Raises:
            AdapterError, CheckpointError, PermissionError: it cannot.
        """
        known = self.catalogue.entries.get(name)
        if known is not None and not known.gone and not inplace:
            raise AdapterError(f"The adapter {name!r} is served already; load_inplace: true puts this one in its place.")
        folder = await asyncio.to_thread(self.catalogue.allowed, path)
        entry = await asyncio.to_thread(self.catalogue.read, name, folder, pinned)
        if known is not None and not known.gone and known.digest == entry.digest and known.pinned == pinned:
            return  # the same values
        ready = [m for m in self.control.members.values() if m.state == "ready"]
        if not ready:
            raise ServingError("No replica is ready to try it out.")
        trial = replace(entry, number=self.catalogue.number + 1)
        await plain(self.actors[min(ready, key=lambda m: m.tokens).name].try_out.remote(trial))
        self.catalogue.put(entry)
        self._tell()

    async def unload(self, name: str) -> None:
        """A name stands for nothing any more."""
        self.catalogue.drop(name)
        self._tell()

    # -- replicas ----------------------------------------------------------------------------------------------------------
    async def _look_after(self) -> None:
        """For ever: see how replicas do, and do what is to be done."""
        while True:
            try:
                await self._turn()
            except Exception:  # whatever it is, replicas are looked after again in a moment
                log.exception("The manager failed at a turn")
            await asyncio.sleep(TICK)

    async def _turn(self) -> None:
        started = [m for m in self.control.members.values() if m.state != "starting"]
        await asyncio.gather(*(self._see(member) for member in started))
        now, tokens = time.monotonic(), sum(m.tokens for m in self.control.members.values())
        self.wanted = self.scaler.wanted(now, tokens)
        room = await asyncio.to_thread(self._room)
        for action in self.control.decide(now, self.wanted, room):
            self._do(action, now)

    async def _see(self, member: Member) -> None:
        try:
            report = await asyncio.wait_for(awaited(self.actors[member.name].report.remote()), SILENCE)
            if report.error is not None:
                raise ServingError(report.error)
            member.requests, member.tokens = report.requests, report.tokens
        except Exception as error:
            log.warning("The replica %s is gone: %r", member.name, error)
            self._stop(member.name)

    def _room(self) -> bool:
        """Whether the cluster has what one more replica needs."""
        import ray

        r, free = self.config.replica, ray.available_resources()
        needs = {"CPU": r.threads, "GPU": r.gpus, **r.resources}
        return all(free.get(name, 0) >= count for name, count in needs.items())

    def _do(self, action: Action, now: float) -> None:
        if action.what == "start":
            self._start()
        elif action.what == "drain":
            member = self.control.members[action.name]
            member.state, member.since = "draining", now
            self._tell()
        else:
            self._stop(action.name)

    def made(self) -> Any:
        """A new replica's actor."""
        import ray

        r = self.config.replica
        made = ray.remote(Replica).options(
            num_cpus=r.threads, num_gpus=r.gpus, resources=r.resources, max_restarts=0, max_concurrency=10_000
        )
        return made.remote(self.config.model_dump())

    def kill(self, actor: Any) -> None:
        """End a replica's actor."""
        import ray

        ray.kill(actor)

    def _start(self) -> None:
        name = f"replica-{uuid.uuid4().hex[:8]}"
        self.actors[name] = self.made()
        member = self.control.members[name] = Member(name=name, generation=self.control.generation)
        task = asyncio.get_running_loop().create_task(self._comes(member))
        self._loading.add(task)
        task.add_done_callback(self._loading.discard)

    async def _comes(self, member: Member) -> None:
        """A replica that was started is ready, or has failed."""
        actor = self.actors[member.name]
        try:
            facts = await asyncio.wait_for(plain(actor.facts.remote()), START)
            if differs := differences(versions(), facts.versions):
                raise ConfigError(f"a replica's machine has other versions: {differs}; all need the same")
            if self.facts_ is None:
                await self._try_all(actor)
            elif facts.fingerprint != self.facts_.fingerprint and self.config.quantization is None:
                raise ConfigError(f"a replica's machine has another base under the name {self.config.base!r}")
        except Exception as error:
            if member.name in self.control.members and member.generation == self.control.generation:
                self.control.failed += 1
                self.error = f"A replica did not start: {error}"
                log.warning(self.error)
            self._stop(member.name)
            return
        if member.name in self.control.members:
            self.facts_ = self.facts_ or facts
            self.control.failed, self.error = 0, ""
            member.state = "ready"
            self._tell()

    async def _try_all(self, actor: Any) -> None:
        """The adapters of the configuration work, before anything is served."""
        for name in self.config.adapters:
            try:
                await plain(actor.load.remote(await self.seal(name)))
            except GraftError as error:
                raise type(error)(f"adapters.{name}: {error}") from error

    def _stop(self, name: str) -> None:
        self.control.members.pop(name, None)
        if (actor := self.actors.pop(name, None)) is not None:
            self.kill(actor)
            self._tell()

    def _tell(self) -> None:
        """Ingresses have something to hear."""
        self.version += 1
        self._news.set()
        self._news = asyncio.Event()

    def __del__(self) -> None:
        for name in list(self.actors):
            self._stop(name)
        self.catalogue.close()


async def plain(reference: Any) -> Any:
    """What a call to another process gives, or its error as it was there, without that process's traceback."""
    try:
        return await reference
    except Exception as error:
        raise as_there(error) from None


def put_in(entries: Sequence[Entry], known: dict[str, Entry]) -> None:
    """Entries by name, newer ones in the place of older ones."""
    for entry in entries:
        if entry.name not in known or known[entry.name].number <= entry.number:
            known[entry.name] = entry
