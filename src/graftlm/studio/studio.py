"""A workspace with what works on it, and what all pages share."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from fastapi import Request, Response
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader

from ..version import __version__
from . import records, shown, words
from .errors import PageError
from .index import SETTINGS, Index
from .jobs import ENDED, JOB, STATE, UNFINISHED, Jobs, settle, state_of
from .server import ChatServer
from .worker import Worker
from .workspace import Workspace

HERE = Path(__file__).parent
log = logging.getLogger("graftlm.studio")
THEMES = ("auto", "light", "dark")
THEME = "graftlm-theme"
MANY, RECENT = 10**6, 20  # runs


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the studio was started with.

    Args:
        port: that it listens at.
        token: of the first address.
        at_once: jobs at a time.
        max_upload: bytes.
        watch: seconds between looks at the queue.
    """

    port: int
    token: str
    at_once: int = 1
    max_upload: int = 512 * 2**20
    watch: float = 1.0


class Studio:
    """A workspace with what works on it."""

    def __init__(self, workspace: Workspace, settings: Settings) -> None:
        self.workspace, self.settings = workspace, settings
        self.index = Index(workspace)
        self.jobs = Jobs(workspace, settings.at_once)
        self.worker = Worker(workspace.root, workspace.own / "worker.log")
        self.server = ChatServer(workspace)
        self.templates = Environment(
            loader=FileSystemLoader(HERE / "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
        )
        self.templates.filters |= shown.FILTERS

    # -- pages -------------------------------------------------------------------------------------------------------------
    def page(self, request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        """A template, or with `_` before its name a part of a page, in the language and colours of the request."""
        return HTMLResponse(self.text(request, template, **values), status)

    def text(self, request: Request, template: str, **values: Any) -> str:
        """The same as a text."""
        language, theme = self.language(request), request.cookies.get(THEME, "auto")
        return self.templates.get_template(template).render(
            _=words.translator(language), language=language, languages=words.LANGUAGES, path=request.url.path,
            theme=theme if theme in THEMES else "auto", csrf=request.scope["state"]["csrf"], version=__version__, **values,
        )  # fmt: skip

    @staticmethod
    def language(request: Request) -> str:
        return words.chosen(request.cookies.get(words.COOKIE), request.headers.get("accept-language", ""))

    # -- beside the pages -------------------------------------------------------------------------------------------------
    def recover(self) -> None:
        """After a start: runs that the index holds for unfinished are read again; those without a process are lost."""
        self.jobs.advance()
        known = {*self.jobs.going(), *self.jobs.waiting()}
        for state in (*UNFINISHED, "unknown"):
            for row in self.index.runs(limit=MANY, state=state):
                folder = self.workspace.runs / row.name
                if row.name not in known and records.read(folder / STATE).get("state", "done") not in ENDED:
                    settle(folder)
                if folder.is_dir():
                    self.index.note(folder)
        self.index.sync()

    def look(self) -> None:
        """Let the queue go on, and index what changed."""
        for folder in self.jobs.advance():
            if folder.is_dir():
                self.index.note(folder)
        self.refresh()

    def refresh(self) -> None:
        """Have the index hold what the folders do: what came or went, and runs that have another state since. Of those that
        the command line makes, whose state is not known until they end, the latest are looked at."""
        self.index.sync()
        for state, most in (*((state, MANY) for state in UNFINISHED), ("unknown", RECENT)):
            for row in self.index.runs(limit=most, state=state):
                folder = self.workspace.runs / row.name
                if folder.is_dir() and state_of(folder).get("state") != state:
                    self.index.note(folder)

    async def begin(self, folder: Path, kind: str, args: Sequence[str], **told: Any) -> Response:
        """Queue a job (see `Jobs.add`), and show its page."""
        await asyncio.to_thread(self.jobs.add, folder, kind, args, **told)
        await asyncio.to_thread(self.index.note, folder)
        return go(f"/runs/{folder.name}")

    async def plan_queue(self) -> None:
        """Have a plan made of each job of the queue, once one waits: by them it may start beside others."""
        entries = await asyncio.to_thread(self.jobs.entries)
        if all("pid" in entry for _, entry in entries):
            return
        for file, entry in entries:
            if "needs" not in entry:
                needs = await self._needs(entry["folders"])
                await asyncio.to_thread(self.jobs.note_plan, file, needs)

    async def _needs(self, names: list[str]) -> int | None:
        """Bytes that runs, which train together, need at most by their plan; None where there is none."""
        folders = [self.workspace.runs / name for name in names]
        if any(records.read(folder / JOB).get("kind") != "train" for folder in folders):
            return None
        try:
            texts = [(folder / SETTINGS).read_text(encoding="utf-8") for folder in folders]
            return (await self.worker.ask("plan", texts=texts))["needs"]
        except (OSError, PageError):  # it goes alone, and says itself what is wrong
            return None

    async def watch(self) -> None:
        """Look at the queue, and plan what is in it, again and again."""

        async def look() -> None:
            await asyncio.to_thread(self.look)
            await self.worker.rest()

        async def again(action: Callable[[], Awaitable[None]]) -> None:
            while True:
                try:
                    await action()
                except Exception:  # a full disk, a folder that was taken away: told, and tried again
                    log.exception("looking at the queue failed")
                await asyncio.sleep(self.settings.watch)

        await asyncio.gather(again(look), again(self.plan_queue))


def go(place: str, **query: Any) -> Response:
    """Send the browser to a page, from an answer to htmx."""
    return Response(status_code=204, headers={"HX-Redirect": place + (f"?{urlencode(query)}" if query else "")})
