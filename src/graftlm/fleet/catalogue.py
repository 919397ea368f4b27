"""The adapters of a fleet: what a name stands for now, told from what it stood for before by a number and by its content.

    a folder → sealed: its files copied once, into a folder called by their digest → what every replica reads

So a folder that changes while it is served changes nothing until it is loaded anew, no two replicas can hold different
values under one entry, and replicas on other machines, which do not see the folder, can be sent its files.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import threading
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import AdapterError, CheckpointError, ConfigError, UnknownAdapterError, nearest
from ..files import WEIGHTS_NAME
from ..methods import PeftConfig
from ..methods.base import CONFIG_NAME
from ..serving.adapters import adapter_folders


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a name stands for.

    Args:
        number: higher than that of all that stood here before.
        source: the folder that it was loaded from.
        kind, front: its method, and places that it takes in front of a prompt.
        digest: of its files; "" before its first use.
        folder: that holds them, on the catalogue's machine.
        pinned: whether it stays attached when it is not used.
        gone: the name stands for nothing.
    """

    name: str
    number: int
    source: str
    kind: str = "unreadable"
    front: int = 0
    digest: str = ""
    folder: str = ""
    pinned: bool = False
    gone: bool = False


class Catalogue:
    """Entries by name. Any thread may ask."""

    def __init__(self, reserved: str) -> None:
        self.reserved = reserved
        self.entries: dict[str, Entry] = {}
        self.roots: tuple[Path, ...] = ()
        self.number = 0
        self._unloaded: set[str] = set()  # by hand: a folder does not come back by itself
        self._lock = threading.RLock()
        self._store: tempfile.TemporaryDirectory | None = None

    def changed(self, since: int) -> list[Entry]:
        """What has another number than `since`, or a higher one."""
        with self._lock:
            return [entry for entry in self.entries.values() if entry.number > since]

    def configure(self, adapters: dict[str, str], roots: list[str]) -> None:
        """Names and folders from a configuration; other names stay.

        Raises:
            ConfigError: a folder that is not there.
        """
        for root in roots:
            if not Path(root).is_dir():
                raise ConfigError(f"adapter_dirs: {root}: expected a folder that holds adapters.")
        with self._lock:
            self.roots = tuple(Path(root) for root in roots)
            for name, folder in adapters.items():
                known = self.entries.get(name)
                if known is None or known.gone or known.source != folder:
                    self.put(self.read(name, folder, pinned=False))
        self.look()

    def look(self) -> None:
        """Find folders that are new."""
        with self._lock:
            for name, folder in adapter_folders(self.roots):
                if name not in self.entries and name not in self._unloaded and name != self.reserved:
                    self.put(described(Entry(name=name, number=0, source=str(folder))))

    def named(self, name: str) -> Entry:
        """What a name stands for. UnknownAdapterError where it stands for nothing."""
        found = self.entries.get(name)
        if found is None or found.gone:
            known = [n for n, entry in self.entries.items() if not entry.gone]
            raise UnknownAdapterError(f"There is no adapter {name!r}{nearest(name, known)}")
        return found

    def read(self, name: str, folder: str, pinned: bool) -> Entry:
        """An entry for a folder, sealed, which is not put in yet.

        Raises:
            AdapterError, CheckpointError: a name or a folder that cannot be used.
        """
        if not name or "+" in name or name == self.reserved:
            raise AdapterError(f"An adapter cannot be called {name!r}.")
        return self.sealed(described(Entry(name=name, number=0, source=folder, pinned=pinned)))

    def seal(self, name: str) -> Entry:
        """A name's entry with its files copied, which happens once."""
        with self._lock:
            entry = self.named(name)
            if not entry.digest:
                entry = self.entries[name] = self.sealed(entry)
            return entry

    def put(self, entry: Entry) -> Entry:
        """A name stands for this from now on."""
        with self._lock:
            self.number += 1
            self.entries[entry.name] = made = replace(entry, number=self.number)
            self._unloaded.discard(entry.name)
            return made

    def drop(self, name: str) -> None:
        """A name stands for nothing from now on."""
        with self._lock:
            self.put(replace(self.named(name), gone=True))
            self._unloaded.add(name)

    def allowed(self, path: str) -> str:
        """A folder below one of those that adapters may come from, links followed. PermissionError for any other."""
        try:
            found = Path(path).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            found = None
        if found is None or not any(found.is_relative_to(root.resolve()) for root in self.roots):
            raise PermissionError("lora_path is no folder below one of this fleet's adapter_dirs.")
        return str(found)

    def files(self, digest: str) -> dict[str, bytes]:
        """The files of a sealed entry."""
        folder = self.store / digest
        if not digest or not folder.is_dir():
            raise CheckpointError(f"There is nothing sealed under {digest!r}.")
        return contents(folder)

    def sealed(self, entry: Entry) -> Entry:
        """The same with its files in the store."""
        source = Path(entry.source)
        if not source.is_dir():
            raise CheckpointError(f"{entry.source!r} is not a directory. Pass the folder that `save_pretrained` wrote.")
        found = contents(source)
        digest = digest_of(found)
        put_files(self.store / digest, found)
        return replace(entry, digest=digest, folder=str(self.store / digest))

    @property
    def store(self) -> Path:
        if self._store is None:
            self._store = tempfile.TemporaryDirectory(prefix="graftlm-fleet-")
        return Path(self._store.name)

    def close(self) -> None:
        """Let the copies go."""
        if self._store is not None:
            self._store.cleanup()


def described(entry: Entry) -> Entry:
    """With what the folder's configuration says; "unreadable" where it says nothing."""
    try:
        config = PeftConfig.from_pretrained(entry.source)
    except (ValueError, OSError):
        return entry
    kind = str(getattr(config.peft_type, "value", config.peft_type)).lower()
    return replace(entry, kind=kind, front=int(getattr(config, "num_virtual_tokens", 0) or 0))


def contents(folder: Path) -> dict[str, bytes]:
    """What an adapter is read from: its configuration and its tensors. (Nothing else is copied, pickles least of all.)

    Raises:
        CheckpointError: it lacks one of them.
    """
    names = sorted(p.name for p in folder.iterdir() if p.suffix in (".json", ".safetensors") and p.is_file())
    for needed in (CONFIG_NAME, WEIGHTS_NAME):
        if needed not in names:
            raise CheckpointError(f"{str(folder)!r} has no {needed}. Pass the folder that `save_pretrained` wrote.")
    return {name: (folder / name).read_bytes() for name in names}


def digest_of(files: dict[str, bytes]) -> str:
    made = hashlib.blake2b(digest_size=16)
    for name, data in sorted(files.items()):
        made.update(f"{name} {len(data)}\n".encode())
        made.update(data)
    return made.hexdigest()


def put_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write a folder whole or not at all; nothing where it is there."""
    if folder.is_dir():
        return
    partial = Path(tempfile.mkdtemp(dir=folder.parent))
    for name, data in files.items():
        (partial / name).write_bytes(data)
    try:
        partial.rename(folder)
    except OSError:  # somebody else was first
        if not folder.is_dir():
            raise
        shutil.rmtree(partial)
