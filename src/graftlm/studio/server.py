"""The process that chats: `graftlm serve` over one base and all adapters of the workspace, as a child of the studio.

It is started by the first question for a base, and again where another base is asked for: one base in memory at a time. An
adapter is loaded before its first question, and again when its files have changed since. Other programs may ask the server,
too: it is OpenAI's API, at `address` with `key`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from . import records
from .errors import PageError
from .job import last_words
from .jobs import alive, identity
from .workspace import Workspace

START_S, PAUSE = 300.0, 0.3
WEIGHTS = "adapter_model.safetensors"
BASE = "(base)"  # what requests call it; no folder is called so


class ChatServer:
    """The server of a workspace, where there is one."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.note, self.log = workspace.own / "server.json", workspace.own / "server.log"
        self.base = self.key = self.admin_key = ""
        self.port = 0
        self.loaded: dict[str, float] = {}  # adapters, with the time of their weights
        self.process: subprocess.Popen | None = None
        self._starting, self._loading = asyncio.Lock(), asyncio.Lock()

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def use(self, base: str) -> None:
        """Have a server of this base.

        Raises:
            PageError: it does not start; what it said.
        """
        async with self._starting:
            if self.running and base == self.base:
                return
            await self.end()
            self.base, self.port, self.loaded = base, free_port(), {}
            self.key, self.admin_key = secrets.token_urlsafe(24), secrets.token_urlsafe(24)
            await asyncio.to_thread(self._start)
            await self._ready()

    def _start(self) -> None:
        end_left_over(self.note)
        command = [
            sys.executable, "-m", "graftlm", "serve", "--base", self.base, "--name", BASE, "--adapter-dir",
            str(self.workspace.runs), "--port", str(self.port),
        ]  # fmt: skip
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=self.workspace.root, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env=os.environ | {"GRAFTLM_API_KEY": self.key, "GRAFTLM_ADMIN_KEY": self.admin_key},
            )  # fmt: skip
        records.write(self.note, identity(self.process.pid))

    async def _ready(self) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + START_S
        async with self._client() as client:
            while loop.time() < until:
                if not self.running:
                    raise PageError(422, "{base} cannot be served: {error}", base=self.base, error=last_words(self.log))
                with contextlib.suppress(httpx.TransportError):  # it does not listen yet
                    if (await client.get("/ready")).status_code == 200:
                        return
                await asyncio.sleep(PAUSE)
        await self.end()
        raise PageError(504, "{base} was not ready after {seconds:.0f} s.", base=self.base, seconds=START_S)

    def _client(self, key: str = "") -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {key or self.key}"}
        return httpx.AsyncClient(base_url=self.address, headers=headers, timeout=None, trust_env=False)

    async def load(self, adapter: str) -> None:
        """Have an adapter of the workspace in the server, as its files are now.

        Raises:
            PageError: it cannot be loaded over this base; what the server said.
        """
        folder = self.workspace.run(adapter)
        try:
            changed = (folder / WEIGHTS).stat().st_mtime
        except FileNotFoundError as gone:
            raise PageError(404, "{name} has no file {file!r}.", name=adapter, file=WEIGHTS) from gone
        body = {"lora_name": adapter, "lora_path": str(folder), "load_inplace": True}
        async with self._loading, self._client(self.admin_key) as client:
            if self.loaded.get(adapter) == changed:
                return
            answer = await client.post("/v1/load_lora_adapter", json=body)
            if answer.status_code != 200:
                raise PageError(answer.status_code, message_of(answer.content))
            self.loaded[adapter] = changed

    async def write(self, adapter: str, messages: list[dict[str, str]], **params: Any) -> AsyncIterator[str]:
        """Pieces of the answer of an adapter ("" for the base) to a conversation.

        Raises:
            PageError: the server refused it, or its adapter.
        """
        if adapter:
            await self.load(adapter)
        body = {"model": adapter or BASE, "messages": messages, "stream": True} | params
        async with self._client() as client, client.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                raise PageError(answer.status_code, message_of(await answer.aread()))
            async for line in answer.aiter_lines():
                data = line.removeprefix("data:").strip()
                if not line.startswith("data:") or data == "[DONE]":
                    continue
                found = json.loads(data)
                if "error" in found:
                    raise PageError(500, found["error"]["message"])
                text = (found["choices"][0]["delta"].get("content") or "") if found["choices"] else ""
                if text:
                    yield text

    async def end(self) -> None:
        """End the server."""
        process, self.process = self.process, None
        if process is not None:
            await asyncio.to_thread(end_process, process)
            self.note.unlink(missing_ok=True)


def end_process(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def end_left_over(note: Path) -> None:
    """End the server of a studio that was killed."""
    entry = records.read(note)
    if entry and alive(entry):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
            psutil.Process(entry["pid"]).terminate()
    note.unlink(missing_ok=True)


def free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return door.getsockname()[1]


def message_of(body: bytes) -> str:
    """What an answer of the server says went wrong."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode("utf-8", "replace")[:500]
