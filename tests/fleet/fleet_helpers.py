"""A fleet without Ray: replicas and the manager live in this process, asked through what looks like actors."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "serving"))

from serving_helpers import saved, tiny, tokenizer  # noqa: E402

from graftlm.fleet.config import FleetConfig  # noqa: E402
from graftlm.fleet.manager import Manager, put_in  # noqa: E402
from graftlm.fleet.remote import Remote  # noqa: E402
from graftlm.fleet.replica import Replica  # noqa: E402
from graftlm.fleet.service import FleetAdapters, FleetService  # noqa: E402


@asynccontextmanager
async def within(seconds: float) -> AsyncIterator[None]:
    """`asyncio.timeout`, which Python 3.10 has not: what takes longer is an error."""
    task, late = asyncio.current_task(), False

    def end() -> None:
        nonlocal late
        late = True
        task.cancel()  # type: ignore[union-attr]

    timer = asyncio.get_running_loop().call_later(seconds, end)
    try:
        yield
    except asyncio.CancelledError:
        if not late:
            raise
        raise AssertionError(f"it took more than {seconds} s") from None
    finally:
        timer.cancel()


class Dead(Exception):
    """As an actor's death looks to who asks it."""


class Asked:
    """A method of another process."""

    def __init__(self, actor: Actor, name: str) -> None:
        self.actor, self.name = actor, name

    def remote(self, *args: Any) -> asyncio.Future:
        return asyncio.ensure_future(self.actor.run(self.name, *args))


class Actor:
    """An object as an actor: awaited, never touched; it can be killed."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.died = asyncio.Event()
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Asked:
        return Asked(self, name)

    async def run(self, name: str, *args: Any) -> Any:
        self.asked.append(name)
        if self.died.is_set():
            raise Dead
        work = asyncio.ensure_future(getattr(self.inner, name)(*args))
        death = asyncio.ensure_future(self.died.wait())
        await asyncio.wait({work, death}, return_when=asyncio.FIRST_COMPLETED)
        death.cancel()
        if not work.done():
            work.cancel()
            raise Dead
        return work.result()

    def kill(self) -> None:
        self.died.set()
        if getattr(self.inner, "engine", None) is not None:
            self.inner.engine.close()


class Local(Manager):
    """A manager whose replicas are in this process."""

    def _room(self) -> bool:
        return True

    def made(self) -> Any:
        return Actor(Replica(self.config.model_dump()))

    def kill(self, actor: Any) -> None:
        actor.kill()


class Fleet:
    """A manager, and an ingress that follows it as the deployed one does."""

    def __init__(self, config: FleetConfig) -> None:
        self.config, self.manager = config, Local()
        self.service: Any = None
        self.remote: Any = None

    async def __aenter__(self) -> Fleet:
        await self.manager.reconfigure(self.config.model_dump())
        asked = Actor(self.manager)
        facts = await self.manager.facts()
        self.remote = Remote(self.config.replica.limits, entries=lambda adapter: self.adapters.sealed(adapter))
        self.adapters = FleetAdapters(asked, lambda: self.remote.held)
        self.service = FleetService(self.remote, self.adapters, facts, self.config.settings())
        self.follows = asyncio.ensure_future(self._follow())
        await self.settled()
        return self

    async def _follow(self) -> None:
        table = await self.manager.watch("", 0, 0)
        while True:
            put_in(table.entries, self.adapters.entries)
            self.remote.update(table.replicas)
            self.service.draining = table.draining
            table = await self.manager.watch(table.manager, table.version, table.number)

    async def settled(self) -> None:
        """As many replicas are ready as there are to be, all of the last generation, and the ingress knows."""
        async with within(60):
            while True:
                ready = [m for m in self.manager.control.members.values() if m.state == "ready"]
                mine = all(m.generation == self.manager.control.generation for m in self.manager.control.members.values())
                enough = len(ready) == len(self.manager.control.members) == self.config.replicas.min
                if enough and mine and set(self.remote.links) == {m.name for m in ready}:
                    return
                await asyncio.sleep(0.05)

    async def __aexit__(self, *_: Any) -> None:
        self.follows.cancel()
        self.remote.close()
        if self.manager._turns is not None:
            self.manager._turns.cancel()
        for name in list(self.manager.actors):
            self.manager._stop(name)
        self.manager.catalogue.close()


def written(root: Path) -> tuple[str, dict[str, str]]:
    """The tiny base and its adapters, in folders."""
    if not (root / "tiny").exists():
        tiny().save_pretrained(root / "tiny")
        tokenizer().save_pretrained(root / "tiny")
    return str(root / "tiny"), saved(root / "adapters")


__all__ = ["Actor", "Dead", "Fleet", "FleetConfig", "within", "written"]
