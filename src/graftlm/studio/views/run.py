"""Runs: the list, and each one's page, which follows it while it goes."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import yaml
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from markupsafe import escape

from .. import records
from ..errors import PageError
from ..index import recipe_in
from ..jobs import ENDED, LOG, OUT, state_of
from ..progress import Progress, tail
from ..studio import Studio, go

PAUSE = 0.7  # seconds between looks at a run that goes on
BREATH = 15.0  # seconds of silence after which the browser is told that we are there
PAGE = 50


def router(studio: Studio) -> APIRouter:
    """Routes of the pages."""
    made = APIRouter(prefix="/runs")

    @made.get("")
    def runs(request: Request, q: str = "", state: str = "", page: int = 1) -> Response:
        studio.index.sync()
        count = studio.index.count(text=q, state=state)
        page = max(1, min(page, -(-count // PAGE) or 1))
        found = studio.index.runs(limit=PAGE, offset=(page - 1) * PAGE, text=q, state=state)
        part = request.headers.get("hx-target") == "runs"
        return studio.page(
            request, "_runs.html" if part else "runs.html", runs=found, count=count, q=q, state=state, page=page,
            pages=-(-count // PAGE) or 1, states=("running", "waiting", *ENDED),
        )  # fmt: skip

    @made.get("/{name}")
    def run(request: Request, name: str) -> Response:
        folder = studio.workspace.run(name)
        view = View(studio, folder)
        view.read()
        return studio.page(
            request, "run.html", **view.values(), log=tail(folder / LOG), curve=view.curve(),
            settings=yaml.safe_dump(recipe_in(folder) or {}, sort_keys=False, allow_unicode=True),
            command=" ".join(["graftlm", *records.read(folder / "job.json").get("args", ())]),
        )  # fmt: skip

    @made.get("/{name}/events")
    async def events(request: Request, name: str) -> Response:
        view = View(studio, studio.workspace.run(name))
        return StreamingResponse(follow(request, view), media_type="text/event-stream")

    @made.post("/{name}/stop")
    async def stop(name: str, request: Request) -> Response:
        now = (await request.form()).get("now") == "1"
        return await done(name, lambda folder: studio.jobs.stop(folder, at_once=now))

    @made.post("/{name}/resume")
    async def resume(name: str) -> Response:
        if records.read(studio.workspace.run(name) / "job.json").get("kind") != "train":
            raise PageError(409, "Only training can be resumed.")
        return await done(name, lambda folder: studio.jobs.again(folder, "--resume"))

    @made.post("/{name}/delete")
    async def delete(name: str) -> Response:
        folder = studio.workspace.run(name)
        if state_of(folder)["state"] not in (*ENDED, "unknown"):
            raise PageError(409, f"{name} has not ended; stop it first.")
        await asyncio.to_thread(shutil.rmtree, folder)
        await asyncio.to_thread(studio.index.sync)
        return go("/runs")

    async def done(name: str, action: Any) -> Response:
        folder = studio.workspace.run(name)
        await asyncio.to_thread(action, folder)
        await asyncio.to_thread(studio.index.note, folder)
        return go(f"/runs/{name}")

    return made


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
        return {
            "name": self.folder.name, "state": state, "progress": progress, "results": found,
            "ended": state.get("state") in ENDED, "place": self._place(), "kind": self.job.get("kind", "train"),
            "resumable": bool(self.job) and any(self.folder.glob("checkpoint-*/trainer_state.json")),
            "adapter": (self.folder / "adapter_config.json").exists(), "took": until - since if since else None,
            "report": (self.folder / OUT / "report.html").exists(),
        }  # fmt: skip

    @property
    def job(self) -> dict[str, Any]:
        return records.read(self.folder / "job.json")

    def _place(self) -> int | None:
        """How many runs come before this one, where it waits."""
        waiting = self.studio.jobs.waiting() if self.state.get("state") == "waiting" else []
        return waiting.index(self.folder.name) + 1 if self.folder.name in waiting else None

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
            "log": lambda: str(escape(tail(self.folder / LOG))),
        }
        moved = self.progress.generation, self.progress.step, len(self.progress.steps)
        marks = {
            "state": (str(self.state), moved, self._place()), "curve": moved, "samples": len(self.progress.evaluations),
            "log": (self.folder / LOG).stat().st_size if (self.folder / LOG).exists() else 0,
        }  # fmt: skip
        changed = [name for name, mark in marks.items() if self._sent.get(name) != mark]
        self._sent = marks
        return [event(name, parts[name]()) for name in changed]


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
        await asyncio.sleep(PAUSE)


def event(name: str, text: str) -> bytes:
    """A server-sent event."""
    lines = "".join(f"data: {line}\n" for line in text.replace("\r", "").split("\n"))
    return f"event: {name}\n{lines}\n".encode()
