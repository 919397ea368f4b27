"""A `Service` whose engine is a fleet: adapters are the manager's, all else is as with one engine."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, cast

from ..errors import UnknownAdapterError
from ..inference.engine import Engine
from ..serving.adapters import About
from ..serving.errors import ApiError
from ..serving.schema import EmbeddingRequest, LoadRequest
from ..serving.service import Service
from ..serving.settings import Settings
from .catalogue import Entry
from .manager import plain, put_in
from .remote import Remote
from .replica import Facts


class FleetAdapters:
    """Names, as `serving.adapters.Adapters` has them; the manager knows what they stand for.

    Args:
        manager: a handle of it.
        held: what some replica has attached.
    """

    def __init__(self, manager: Any, held: Any) -> None:
        self.manager, self.held = manager, held
        self.entries: dict[str, Entry] = {}
        self.loop, self._thread = asyncio.get_running_loop(), threading.get_ident()

    def names(self) -> list[str]:
        return [name for name, entry in list(self.entries.items()) if not entry.gone]

    def knows(self, names: list[str]) -> bool:
        """Whether all of these may be asked for; folders that are new are looked for where not. (Who asks in the event loop
        calls `find` before.)"""
        if not self._all(names) and threading.get_ident() != self._thread:
            asyncio.run_coroutine_threadsafe(self.find(names), self.loop).result()
        return self._all(names)

    def _all(self, names: list[str]) -> bool:
        known = set(self.names())
        return all(name in known for name in names)

    async def find(self, names: list[str]) -> None:
        """Ask the manager for what is not known."""
        if not self._all(names):
            number = max((entry.number for entry in self.entries.values()), default=0)
            put_in(await plain(self.manager.look.remote(number)), self.entries)

    async def sealed(self, adapter: str) -> list[Entry]:
        """What a composition's names stand for, with their files."""
        found = []
        for name in filter(None, adapter.split("+")):
            entry = self.entries.get(name)
            if entry is None or entry.gone:
                raise UnknownAdapterError(f"There is no adapter {name!r} any more.")
            if not entry.digest:
                entry = await plain(self.manager.seal.remote(name))
                put_in([entry], self.entries)
            found.append(entry)
        return found

    def about(self, name: str) -> About:
        entry = self.entries[name]
        return About(
            folder=entry.source, kind=entry.kind, digest=entry.digest or None, loaded=name in self.held(),
            pinned=entry.pinned, front=entry.front,
        )  # fmt: skip


class FleetService(Service):
    """Of one ingress; made in its event loop."""

    def __init__(self, remote: Remote, adapters: FleetAdapters, facts: Facts, settings: Settings) -> None:
        self.engine = cast(Engine, remote)
        self.settings = settings
        self.adapters = adapters  # type: ignore[assignment]
        self.fleet = adapters
        self.facts = facts
        self.begin_with(facts.tokenizer, facts.vocabulary, facts.limit)

    @property
    def width(self) -> int:
        return self.facts.width

    async def embed(self, body: EmbeddingRequest) -> tuple[list[list[float]], int]:
        await self.fleet.find(names_in(body.model, self.settings.base_name))
        return await super().embed(body)

    async def load(self, body: LoadRequest) -> None:
        """Serve an adapter from a folder below one of the fleet's, under a name: tried out once, then everywhere."""
        self.check_name(body.lora_name)
        asked = self.fleet.manager.load.remote(body.lora_name, body.lora_path, body.pinned, body.load_inplace)
        try:
            await plain(asked)
        except PermissionError as error:
            raise ApiError(403, str(error), param="lora_path") from error
        await self._heard()

    async def unload(self, name: str) -> None:
        """Serve it no more; what runs on it ends on it."""
        try:
            await plain(self.fleet.manager.unload.remote(name))
        except UnknownAdapterError as error:
            raise ApiError(404, str(error), param="lora_name", code="model_not_found") from error
        await self._heard()

    async def _heard(self) -> None:
        """What the manager did is known here before its asker is told."""
        put_in(await plain(self.fleet.manager.look.remote(-1)), self.fleet.entries)


def names_in(model: str, base: str) -> list[str]:
    return [] if model == base else model.split("+")
