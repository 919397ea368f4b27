"""The adapters of a server as clients see them: names, folders, kinds. The engine's registry does the rest."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import GraftError
from ..inference.registry import Registry, State, Version
from ..methods import PeftConfig
from ..methods.base import CONFIG_NAME


@dataclass(frozen=True, kw_only=True)
class About:
    """One adapter, for people.

    Args:
        folder: where it comes from; the base's name for one that is attached itself.
        kind: its method, or "unreadable".
        digest: of all that it computes; None before its first use.
        front: places that it takes in front of a prompt.
    """

    folder: str | None
    kind: str
    digest: str | None
    loaded: bool
    pinned: bool
    front: int


class Adapters:
    """Names over a registry, and folders in which more of them may appear.

    Args:
        roots: each folder in them that holds an adapter is served by its name.
        reserved: what no adapter may be called.
    """

    def __init__(self, registry: Registry, roots: tuple[Path, ...], reserved: str) -> None:
        self.registry = registry
        self.roots = roots
        self.reserved = reserved
        self._unloaded: set[str] = set()  # by hand: a folder does not come back by itself
        self._lock = threading.Lock()
        self.look()

    def look(self) -> None:
        """Find folders that are new."""
        with self._lock:
            for name, folder in adapter_folders(self.roots):
                if name not in self.registry.names and name not in self._unloaded and name != self.reserved:
                    self.registry.add(name, folder)

    def names(self) -> list[str]:
        """All that may be asked for."""
        return list(self.registry.names)

    def knows(self, names: list[str]) -> bool:
        """Whether all of these may be asked for; folders that are new are looked for where not."""
        if all(name in self.registry.names for name in names):
            return True
        self.look()
        return all(name in self.registry.names for name in names)

    def unloaded(self, name: str) -> None:
        self._unloaded.add(name)

    def loaded(self, name: str) -> None:
        self._unloaded.discard(name)

    def about(self, name: str) -> About:
        """One of them."""
        version = self.registry.named(name)  # which may have been unloaded by now
        config = self._config(version)
        kind = "unreadable" if config is None else str(getattr(config.peft_type, "value", config.peft_type)).lower()
        front = int(getattr(config, "num_virtual_tokens", 0) or 0)
        return About(
            folder=None if version.path is None else str(version.path), kind=kind, digest=version.digest or None,
            loaded=version.state is State.LIVE, pinned=version.pinned, front=front,
        )  # fmt: skip

    def _config(self, version: Version) -> Any:
        method = self.registry.model.methods.get(version.attached)
        if method is not None:
            return method.config
        try:
            return PeftConfig.from_pretrained(str(version.path))
        except (GraftError, OSError):
            return None


def adapter_folders(roots: Iterable[Path]) -> Iterator[tuple[str, Path]]:
    """Adapters below these, by the names that they are served by: their folders'; "+" joins names, so none has it."""
    for root in roots:
        for folder in sorted(path.parent for path in root.glob(f"*/{CONFIG_NAME}")):
            if "+" not in folder.name:
                yield folder.name, folder
