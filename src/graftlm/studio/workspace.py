"""The workspace: a folder that holds all that the studio knows.

    runs/NAME/      a run each: job.json, state.json, log.txt, settings.yaml, and what `graftlm train` writes
    data/           uploaded files; NAME.link.json of those that lie elsewhere
    chats/          a file a conversation, votes in it
    queue/          runs that wait or go on, a file each
    .studio/        the key of the cookie, the index

Paths that come from a browser are looked up by `Workspace.path`, which resolves links first.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

from .errors import PageError

NAME = re.compile(r"\w[\w.-]{0,79}")
FOLDERS = ("runs", "data", "chats", "queue", ".studio")


class Workspace:
    """The folder, and the others that may be read.

    Args:
        root: made where it is missing.
        given: folders from which data, bases and adapters may be read besides.
    """

    def __init__(self, root: str | os.PathLike, given: Iterable[str | os.PathLike] = ()) -> None:
        self.root = Path(root).expanduser().resolve()
        self.given = tuple(Path(folder).expanduser().resolve() for folder in given)
        for name in FOLDERS:
            (self.root / name).mkdir(parents=True, exist_ok=True)
        self.runs, self.data, self.chats, self.queue, self.own = (self.root / name for name in FOLDERS)

    def path(self, text: str) -> Path:
        """An existing file or folder, links resolved, in the workspace (to which relative paths belong) or a given folder.

        Raises:
            PageError: it lies elsewhere (403), or is not there (404).
        """
        found = self._inside(text)
        if not found.exists():
            raise PageError(404, "{text!r} does not exist.", text=text)
        return found

    def target(self, text: str) -> Path:
        """A path for a new folder, in the workspace or a given folder.

        Raises:
            PageError: it lies elsewhere (403), or is there already (409).
        """
        found = self._inside(text)
        if found.exists():
            raise PageError(409, "{text!r} is there already; name a new folder.", text=text)
        return found

    def _inside(self, text: str) -> Path:
        found = self._resolved(text)
        if self.own in (found, *found.parents) or not any(root in (found, *found.parents) for root in self.roots):
            places = ", ".join(str(root) for root in self.roots)
            raise PageError(
                403,
                "{text!r} is outside of what the studio may read ({places}). Start it with --folder to add a folder.",
                text=text,
                places=places,
            )
        return found

    def _resolved(self, text: str) -> Path:
        try:
            return (self.root / Path(text).expanduser()).resolve()
        except (OSError, ValueError, RuntimeError) as error:  # a zero byte, a circle of links, no such user
            raise PageError(400, "{text!r} is no path: {error}", text=text, error=error) from error

    @property
    def roots(self) -> tuple[Path, ...]:
        return self.root, *self.given

    def shown(self, path: Path) -> str:
        """A path as recipes in the workspace name it."""
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)

    def run(self, name: str) -> Path:
        """A run's folder. PageError: no such run."""
        if (found := self._named(self.runs, name)) is None:
            raise PageError(404, "There is no run {name!r} here.", name=name)
        return found

    def chat(self, name: str) -> Path:
        """A conversation's file. PageError: no such one."""
        if (found := self._named(self.chats, f"{name}.json")) is None:
            raise PageError(404, "There is no chat {name!r} here.", name=name)
        return found

    @staticmethod
    def _named(folder: Path, name: str) -> Path | None:
        found = folder / name
        return found if NAME.fullmatch(name) and found.exists() and found.resolve().parent == folder else None

    def new_run(self, wanted: str) -> Path:
        """A new run's folder, by a name like the one that is wanted, with a number where that is taken."""
        return self._new(self.runs, wanted)

    def new_file(self, wanted: str) -> Path:
        """The path for a new file in data/; the file is made, empty, so that no other takes it."""
        stem, dot, ending = wanted.rpartition(".")
        found = self._free(self.data, slug(stem), dot + slug(ending))
        found.touch(exist_ok=False)
        return found

    def _new(self, folder: Path, wanted: str) -> Path:
        while True:
            found = self._free(folder, slug(wanted), "")
            try:
                found.mkdir()
                return found
            except FileExistsError:  # taken meanwhile
                continue

    @staticmethod
    def _free(folder: Path, stem: str, ending: str) -> Path:
        numbers = iter(range(2, 10**9))
        found = folder / f"{stem}{ending}"
        while found.exists():
            found = folder / f"{stem}-{next(numbers)}{ending}"
        return found

    def key(self) -> bytes:
        """What cookies are signed with: made once, so that a page that is open outlives the studio."""
        file = self.own / "key"
        if not file.exists():
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as out:
                out.write(secrets.token_bytes(32))
        return file.read_bytes()


def slug(text: str) -> str:
    """A name for files out of a text: letters, digits, `_`, `-` and dots inside."""
    kept = re.sub(r"[^\w.-]+", "-", text, flags=re.ASCII).strip("-.")
    return re.sub(r"\.{2,}", ".", kept)[:60].rstrip("-.") or "untitled"
