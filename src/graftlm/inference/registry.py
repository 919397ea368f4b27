"""The adapters of a server: by name, of which each may have several versions, attached as they are needed.

    name      what requests ask for; a version is what it stood for when they came
    cold  →  reading (a thread)  →  read  →  live (attached, by the engine's thread, between steps)  →  gone

A request holds the versions that it goes through. A name that is loaded anew stands for another version from the moment
that one is live; requests on the old one finish on it, and then it goes. Of versions that nobody uses as many stay attached
as there is room for, the ones used last; the others are attached again from their directory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from itertools import count
from pathlib import Path
from typing import Any

import torch

from ..errors import AdapterError, CheckpointError, GraftError, UnknownAdapterError, nearest
from ..files import WEIGHTS_NAME
from ..methods import PeftConfig
from .threads import begin

log = logging.getLogger("graftlm.serving")
READERS = 4  # directories that are read at a time


class State(Enum):
    COLD = "cold"
    READING = "reading"
    READ = "read"
    LIVE = "live"
    GONE = "gone"


@dataclass(eq=False, kw_only=True)
class Version:
    """What a name stands for, at a time.

    Attributes:
        attached: the name that the model has it under.
        path: its directory; None for one that was attached before, which stays.
        digest: of its configuration and values, once it is live.
        users: requests that go through it, or wait for it while it is live.
        retired: its name stands for another one now, or for none.
        error: why it could not be read or attached at the last try.
        loaded: who waits for it to be live.
    """

    name: str
    attached: str
    path: Path | None
    pinned: bool = False
    state: State = State.COLD
    digest: str = ""
    users: int = 0
    used: int = 0
    retired: bool = False
    error: Exception | None = None
    loaded: list[Future] = field(default_factory=list)


class Registry:
    """Adapters by name.

    Args:
        model: the `PeftModel`; what is attached to it is served under its own names, and stays.
        most: versions that are attached at a time, those aside.
        woken: called when a directory has been read (by another thread).
        gone: called with a version that was detached.
    """

    def __init__(
        self,
        model: Any,
        most: int,
        woken: Callable[[], None] = lambda: None,
        gone: Callable[[Version], None] = lambda v: None,
    ) -> None:
        self.model = model
        self.most = most
        self.woken = woken
        self.gone = gone
        self.lock = threading.RLock()
        self.names: dict[str, Version] = {}
        self.live: list[Version] = []  # of those from directories
        self.wanted: set[Version] = set()  # what the first request needs that found no room
        self.draining: set[Version] = set()  # no new request is let through these, so that they become free for it
        self.coming: dict[str, Version] = {}  # of names that are loaded anew, what they will stand for
        self.counts = {"loaded": 0, "failed": 0, "evicted": 0}  # since the start
        self._numbers = count(1)
        self._clock = count(1)
        self._places = threading.Semaphore(READERS)
        self._closed = False
        for name in model.methods:
            own = Version(name=name, attached=name, path=None, pinned=True, state=State.LIVE, digest=digest_of(model, name))
            self.names[name] = own

    # -- any thread ------------------------------------------------------------------------------------------------------
    def add(self, name: str, path: str | Path, pinned: bool = False) -> None:
        """A name for a directory, which is read when it is first asked for."""
        with self.lock:
            if name in self.names:
                raise AdapterError(f"There is an adapter {name!r} already. Load it anew to replace it.")
            self.names[name] = self._version(name, path, pinned)

    def load(self, name: str, path: str | Path, pinned: bool = False) -> Future:
        """Read and attach a directory, and let `name` stand for it from then on; before, and where it fails, it stands for
        what it stood for. The future has the version, or the error."""
        done: Future = Future()
        with self.lock:
            if name in self.names and self.names[name].path is None:
                raise AdapterError(f"{name!r} was attached to the model itself and cannot be replaced; choose another name.")
            version, before = self._version(name, path, pinned), self.coming.get(name)
            version.loaded.append(done)
            self.coming[name] = version
            self._read(version)
        for future in () if before is None else before.loaded:
            future.set_exception(AdapterError(f"{name!r} was loaded again, from {path}, before it was there."))
        return done

    def unload(self, name: str) -> None:
        """A name stands for nothing from now on; requests on it finish."""
        with self.lock:
            version = self.named(name)
            if version.path is None:
                raise AdapterError(f"{name!r} was attached to the model itself and cannot be unloaded.")
            del self.names[name]
            version.retired = True
        self.woken()

    def pin(self, name: str, pinned: bool = True) -> None:
        """Whether an adapter stays attached when it is not used."""
        with self.lock:
            self.named(name).pinned = pinned

    def resolve(self, adapter: str) -> tuple[Version, ...]:
        """What "name" or "style+task" stands for now; "" for nothing, the base.

        Raises:
            UnknownAdapterError: a name that there is not.
            AdapterError: a name twice.
        """
        with self.lock:
            if not adapter:
                return ()
            names = [adapter] if adapter in self.names else adapter.split("+")
            if len(set(names)) < len(names):
                raise AdapterError(f"{adapter!r} names an adapter twice: expected different ones.")
            return tuple(self.named(name) for name in names)

    def named(self, name: str) -> Version:
        if name not in self.names:
            have = ", ".join(map(repr, self.names)) or "none"
            raise UnknownAdapterError(f"There is no adapter {name!r}; served: {have}{nearest(name, self.names)}")
        return self.names[name]

    def close(self) -> None:
        """Read no more."""
        self._closed = True
        with self.lock:
            left = list(self.coming.values())
            self.coming.clear()
        for future in [f for version in left for f in version.loaded]:
            future.set_exception(AdapterError("The server was stopped."))

    def _version(self, name: str, path: str | Path, pinned: bool) -> Version:
        if not name or "+" in name:
            raise AdapterError(f"{name!r} cannot name an adapter: expected a name without '+', which joins names.")
        return Version(name=name, attached=f"served-{next(self._numbers)}", path=Path(path), pinned=pinned)

    def _read(self, version: Version) -> None:
        version.state = State.READING
        begin(lambda: self._reading(version), "graftlm-adapter")

    def _reading(self, version: Version) -> None:
        """In a thread: everything of a directory that takes time and touches no model."""
        error: Exception | None = None
        with self._places:
            if self._closed:
                return
            try:
                read(version.path)  # type: ignore[arg-type]
            except Exception as reason:  # whatever is wrong with a directory is its requests' matter
                error = reason
        with self.lock:
            self.counts["failed"] += error is not None
            version.error = error
            version.state = State.COLD if error else State.READ
        self.woken()

    # -- the engine's thread ---------------------------------------------------------------------------------------------
    def tend(self) -> None:
        """Between steps: let names stand for what has come, and detach what was retired and is used no more."""
        self.wanted, self.draining = set(), set()
        for name, version in list(self.coming.items()):
            self._come(name, version)
        for version in [v for v in self.live if v.retired and not v.users]:
            self.detach(version)

    def prepare(self, versions: Sequence[Version]) -> bool:
        """Have versions attached. False: some are on their way, or there is no room for them yet. Requests ask in the order
        of their arrival after each `tend`: what the first one needs that finds no room stays attached, and is kept from
        those behind it.

        Raises:
            GraftError: one cannot be read or attached.
        """
        with self.lock:  # a thread that reads may end at any moment: what is decided here is decided by one look
            for version in versions:
                error, version.error = version.error, None
                if error is not None:
                    raise _told(version, error) from error
            for version in versions:
                if version.state is State.COLD:
                    self._read(version)
            if any(v.state is State.READING or v in self.draining for v in versions):
                return False
        fresh = [v for v in versions if v.state is State.READ]
        if fresh and not self._make_room(len(fresh), set(versions)):
            return False
        for version in fresh:
            self._attach(version)
        return True

    def take(self, versions: Sequence[Version]) -> None:
        """A request goes through them from now on."""
        for version in versions:
            version.users += 1
            version.used = next(self._clock)

    def give(self, versions: Sequence[Version]) -> None:
        """It is done."""
        for version in versions:
            version.users -= 1

    def detach(self, version: Version) -> None:
        """Take a version off the model; it can be attached again."""
        self.model.delete_adapter(version.attached)
        self.live.remove(version)
        version.state = State.GONE if version.retired else State.COLD
        self.gone(version)

    def _attach(self, version: Version) -> None:
        try:
            self.model.load_adapter(version.path, version.attached)
            version.digest = digest_of(self.model, version.attached)
        except Exception as error:
            version.state = State.COLD
            self.counts["failed"] += 1
            if version.attached in self.model.methods:
                self.model.delete_adapter(version.attached)
            raise _told(version, error) from error
        version.state, version.used = State.LIVE, next(self._clock)
        self.counts["loaded"] += 1
        self.live.append(version)

    def _come(self, name: str, version: Version) -> None:
        """A name that is loaded anew stands for its new version as soon as that is live."""
        error: Exception | None = None
        try:
            if not self.prepare([version]):
                return
        except GraftError as reason:
            error = reason
        with self.lock:
            if self.coming.get(name) is version:
                del self.coming[name]
            if error is None:
                if name in self.names:
                    self.names[name].retired = True
                self.names[name] = version
        for future in version.loaded:
            future.set_result(version) if error is None else future.set_exception(error)
        version.loaded.clear()

    def _make_room(self, needed: int, own: set[Version]) -> bool:
        """Detach what was used longest ago until so many more fit. Where all are in use, those used longest ago are let run
        dry."""
        staying = [v for v in self.live if v.pinned or v in own]
        if len(staying) + needed > self.most:
            raise AdapterError(
                f"{needed} more adapters do not fit: {self.most} may be attached at a time, and {len(staying)} of them are "
                "pinned or of this request. Raise max_adapters."
            )
        others = sorted((v for v in self.live if not v.pinned and v not in own | self.wanted), key=lambda v: v.used)
        excess = len(self.live) + needed - self.most
        for version in [v for v in others if not v.users][: max(excess, 0)]:
            self.detach(version)
            self.counts["evicted"] += 1
            excess -= 1
        if excess > 0 and not self.wanted:
            self.wanted = own
            self.draining = set([v for v in others if v.users][:excess])
        return excess <= 0


def _told(version: Version, error: Exception) -> GraftError:
    """What those who asked for an adapter are told: its name where its directory stood, which is for the log."""
    log.warning("The adapter %r in %s cannot be served: %s", version.name, version.path, error)
    text, path = str(error) if isinstance(error, GraftError) else repr(error), version.path
    for place in () if path is None else (str(path.resolve()), str(path)):
        text = text.replace(place, version.name)
    kind = type(error) if isinstance(error, GraftError) else CheckpointError
    return kind(f"The adapter {version.name!r} cannot be served: {text}")


def read(path: Path) -> None:
    """Read an adapter's directory, so that attaching it finds everything in memory."""
    if not path.is_dir():
        raise CheckpointError(f"{str(path)!r} is not a directory. Pass the folder that `save_pretrained` wrote.")
    PeftConfig.from_pretrained(path)
    weights = path / WEIGHTS_NAME
    if weights.is_file():
        with weights.open("rb") as file:
            while file.read(1 << 24):
                pass


def joint_digest(versions: Sequence[Version]) -> str:
    """A digest of what live versions compute together."""
    return hashlib.blake2b("+".join(v.digest for v in versions).encode(), digest_size=16).hexdigest()


def digest_of(model: Any, name: str) -> str:
    """A digest of all that an attached adapter computes by: its configuration and its values."""
    config = model.methods[name].config.to_dict() | {"inference_mode": None, "base_model_name_or_path": None}
    made = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=16)
    for key, parameter in sorted(model.adapter_parameters(name), key=lambda item: item[0]):
        value = parameter.detach().cpu().contiguous()
        made.update(f"{key.replace(name, '')} {value.dtype} {tuple(value.shape)}".encode())
        made.update(value.flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return made.hexdigest()
