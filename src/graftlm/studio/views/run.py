"""Runs: the list, and each one's page, which follows it while it goes."""

from __future__ import annotations

import asyncio
import json
import shlex
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import yaml
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from markupsafe import escape

from .. import adapters as files
from .. import records, shown
from ..bases import is_model
from ..errors import PageError
from ..index import recipe_in
from ..jobs import ENDED, JOB, OUT, UNFINISHED, fits, kind_of, log_of, state_of
from ..progress import Progress, tail
from ..studio import Studio, go
from .adapters import as_zip

PAUSE = 0.7  # seconds between looks at a run that goes on
BREATH = 15.0  # seconds of silence after which the browser is told that we are there
PAGE = 50


def router(studio: Studio) -> APIRouter:
    """Routes of the pages."""
    made = APIRouter(prefix="/runs")
    add_pages(made, studio)
    add_actions(made, studio)
    return made


def add_pages(made: APIRouter, studio: Studio) -> None:
    @made.get("")
    def runs(request: Request, q: str = "", state: str = "", page: int = 1, seen: str = "") -> Response:
        studio.refresh()
        count = studio.index.count(text=q, state=state)
        page = max(1, min(page, -(-count // PAGE) or 1))
        found = studio.index.runs(limit=PAGE, offset=(page - 1) * PAGE, text=q, state=state)
        part, now = request.headers.get("hx-target") == "runs", f"{count}-{shown.mark(found)}"
        if part and seen == now:
            return Response(status_code=204)
        return studio.page(
            request, "_runs.html" if part else "runs.html", runs=found, count=count, q=q, state=state, page=page,
            pages=-(-count // PAGE) or 1, states=(*UNFINISHED, *ENDED), seen=now,
        )  # fmt: skip

    @made.get("/{name}")
    def run(request: Request, name: str) -> Response:
        folder = studio.workspace.run(name)
        view = View(studio, folder)
        view.read()
        return studio.page(
            request, "run.html", **view.values(), log=tail(log_of(folder)), curve=view.curve(),
            settings=yaml.safe_dump(recipe_in(folder) or {}, sort_keys=False, allow_unicode=True),
            command=shlex.join(["graftlm", *args]) if (args := view.job.get("args")) else "", others=others_to(studio, name),
        )  # fmt: skip

    @made.get("/{name}/zip")
    def zipped(name: str) -> Response:
        folder = studio.workspace.run(name)
        found = [(p, f"{name}/{p.relative_to(folder / OUT)}") for p in sorted((folder / OUT).rglob("*")) if p.is_file()]
        if not found:
            raise PageError(404, "{name} has made no files.", name=name)
        return as_zip(name, [(studio.workspace.path(str(path)), own) for path, own in found])

    @made.get("/{name}/events")
    async def events(request: Request, name: str) -> Response:
        view = View(studio, studio.workspace.run(name))
        return StreamingResponse(follow(request, view), media_type="text/event-stream")


def add_actions(made: APIRouter, studio: Studio) -> None:
    @made.post("/{name}/stop")
    async def stop(name: str, request: Request) -> Response:
        now = (await request.form()).get("now") == "1"
        return await done(name, lambda folder: studio.jobs.stop(folder, at_once=now))

    @made.post("/{name}/beside")
    async def beside(name: str) -> Response:
        return await done(name, studio.jobs.beside)

    @made.post("/{name}/resume")
    async def resume(name: str) -> Response:
        if kind_of(studio.workspace.run(name)) != "train":
            raise PageError(409, "Only training can be resumed.")
        return await done(name, lambda folder: studio.jobs.again(folder, "--resume"))

    @made.post("/{name}/delete")
    async def delete(name: str) -> Response:
        folder = studio.workspace.run(name)
        if state_of(folder)["state"] not in (*ENDED, "unknown"):
            raise PageError(409, "{name} has not ended; stop it first.", name=name)
        await asyncio.to_thread(shutil.rmtree, folder)
        await asyncio.to_thread(studio.index.sync)
        return go("/runs")

    async def done(name: str, action: Any) -> Response:
        folder = studio.workspace.run(name)
        await asyncio.to_thread(action, folder)
        await asyncio.to_thread(studio.look)  # what trains together with it changed, too
        await asyncio.to_thread(studio.index.note, folder)
        return go(f"/runs/{name}")


class View:
    """A run as its page shows it, read on bit by bit."""

    def __init__(self, studio: Studio, folder: Path) -> None:
        self.studio, self.folder = studio, folder
        self.progress = Progress(folder)
        self.state: dict[str, Any] = {}
        self._sent: dict[str, Any] = {}

    def read(self) -> None:
        """Look at the files again."""
        self.state = state_of(self.folder)
        self.progress.read()

    def values(self) -> dict[str, Any]:
        """What the templates need."""
        state, progress = self.state, self.progress
        since, until = state.get("started"), state.get("ended") or time.time()
        found = records.read(self.folder / "metrics.json") if state.get("state") in ENDED else {}
        saved = files.checkpoints(self.folder)
        return {
            "name": self.folder.name, "state": state, "progress": progress, "results": found,
            "ended": state.get("state") in ENDED, "queue": self._queue(), "kind": kind_of(self.folder),
            "resumable": bool(self.job) and bool(saved), "checkpoints": saved,
            "base": files.base_of(self.studio.workspace, self.folder.name),
            "adapter": (self.folder / "adapter_config.json").exists(), "took": until - since if since else None,
            "report": (self.folder / OUT / "report.html").exists(), "made": self._made(),
            "together": [n for n in self.job.get("together", ()) if n != self.folder.name],
        }  # fmt: skip

    @property
    def job(self) -> dict[str, Any]:
        return records.read(self.folder / JOB)

    def _made(self) -> dict[str, Any]:
        """What a job of another kind than training made: the folder as recipes name it, whether it is a model."""
        out = self.folder / OUT
        if self.state.get("state") != "done" or not out.is_dir():
            return {}
        return {"place": self.studio.workspace.shown(out), "model": is_model(out)}

    def _queue(self) -> dict[str, Any]:
        """Where a run that waits stands: its place, what it needs, whether it fits beside what goes on (None: not known)."""
        if self.state.get("state") != "waiting":
            return {}
        entries = [entry for _, entry in self.studio.jobs.entries()]
        waiting = [entry for entry in entries if "pid" not in entry]
        place = next((i for i, entry in enumerate(waiting) if self.folder.name in entry["folders"]), None)
        if place is None:
            return {}
        own, going = waiting[place], [entry for entry in entries if "pid" in entry]
        known = all("needs" in entry for entry in (own, *going))
        return {
            "place": place + 1, "needs": own.get("needs"), "fits": fits(own, going) if known and not place else None,
            "beside": own.get("beside", False),
        }  # fmt: skip

    def curve(self) -> dict[str, Any]:
        """The curve of the file, or, where the run wrote none, that of its measures."""
        if self.progress.steps or self.progress.evaluations:
            return self.progress.curve()
        history = records.read(self.folder / "metrics.json").get("history", ())
        train = {e["step"]: e["loss"] for e in history if "loss" in e}
        held_out = {e["step"]: e["eval_loss"] for e in history if "eval_loss" in e}
        at = sorted(train.keys() | held_out.keys())
        return {"step": at, "train": [train.get(s) for s in at], "held_out": [held_out.get(s) for s in at]}

    def news(self, request: Request) -> list[bytes]:
        """Events for what changed since it was asked before."""
        self.read()
        text = self.studio.text
        parts = {
            "state": lambda: text(request, "_run_state.html", **self.values()),
            "curve": lambda: json.dumps(self.curve()),
            "samples": lambda: text(request, "_samples.html", **self.values()),
            "checkpoints": lambda: text(request, "_checkpoints.html", **self.values()),
            "log": lambda: str(escape(tail(log_of(self.folder)))),
        }
        moved = self.progress.generation, self.progress.step, len(self.progress.steps)
        marks = {
            "state": (str(self.state), moved, self._queue()), "curve": moved, "samples": len(self.progress.evaluations),
            "checkpoints": files.checkpoints(self.folder),
            "log": log.stat().st_size if (log := log_of(self.folder)).exists() else 0,
        }  # fmt: skip
        changed = [name for name, mark in marks.items() if self._sent.get(name) != mark]
        self._sent = marks
        return [event(name, parts[name]()) for name in changed]


def others_to(studio: Studio, name: str) -> list[str]:
    """Names of other trained runs, to compare one with, the latest first; those on the same data before the rest."""
    own = studio.index.run(name)
    found = studio.index.runs(limit=PAGE, kind="train")
    return [r.name for r in sorted(found, key=lambda r: own is not None and r.data != own.data) if r.name != name]


async def follow(request: Request, view: View) -> AsyncIterator[bytes]:
    """Events until the run has ended, or the browser is gone."""
    spoke = time.monotonic()
    while not await request.is_disconnected():
        made = await asyncio.to_thread(view.news, request)
        for piece in made:
            yield piece
        if view.state.get("state") in (*ENDED, "unknown"):
            yield event("end", "")
            return
        now = time.monotonic()
        if made:
            spoke = now
        elif now - spoke > BREATH:
            spoke = now
            yield b": here\n\n"
        await asyncio.sleep(PAUSE if view.state.get("state") != "waiting" else 3 * PAUSE)


def event(name: str, text: str) -> bytes:
    """A server-sent event."""
    lines = "".join(f"data: {line}\n" for line in text.replace("\r", "").split("\n"))
    return f"event: {name}\n{lines}\n".encode()
