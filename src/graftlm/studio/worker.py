"""The studio's side of a process that has the libraries imported (`errands` is the other): pages stay quick meanwhile.

It is started with the studio, told in lines of JSON, ended when nothing was asked for a while, and started anew at the next
question.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

from .errors import PageError

IDLE = 900.0  # seconds without a question after which it is ended
LINE = 64 * 2**20  # bytes of an answer


class Worker:
    """Questions to the process.

    Args:
        folder: in which it works; relative paths belong to it.
        log: file for what its libraries say.
    """

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder, self.log = folder, log
        self.process: asyncio.subprocess.Process | None = None
        self._numbers = itertools.count()
        self._answers: dict[int, asyncio.Future] = {}
        self._starting = asyncio.Lock()
        self._reader: asyncio.Task | None = None
        self._asked = 0.0

    async def ask(self, name: str, /, timeout: float = 600.0, **values: Any) -> Any:
        """The answer of an errand.

        Raises:
            PageError: what the errand refused (422), died of (500), or took too long for (504).
        """
        process = await self._running()
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self._asked = asyncio.get_running_loop().time()
        try:
            process.stdin.write(json.dumps({"id": number, "name": name, "values": values}).encode() + b"\n")  # type: ignore[union-attr]
            return await asyncio.wait_for(answer, timeout)
        except (TimeoutError, asyncio.TimeoutError) as late:
            await self.end()
            raise PageError(504, "This took longer than {seconds:.0f} s and was ended.", seconds=timeout) from late
        except (BrokenPipeError, ConnectionResetError) as gone:
            raise PageError(500, "The helper process ended; try again.") from gone
        finally:
            self._answers.pop(number, None)

    async def _running(self) -> asyncio.subprocess.Process:
        async with self._starting:
            if self.process is None or self.process.returncode is not None:
                with self.log.open("ab") as log:
                    self.process = await asyncio.create_subprocess_exec(
                        sys.executable, "-m", "graftlm.studio.errands", stdin=asyncio.subprocess.PIPE,
                        stdout=asyncio.subprocess.PIPE, stderr=log, cwd=self.folder, limit=LINE,
                        env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
                    )  # fmt: skip
                self._reader = asyncio.create_task(self._read(self.process))
            return self.process

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        """Hand out answers until the process ends; then whoever still waits is told."""
        while line := await process.stdout.readline():  # type: ignore[union-attr]
            found = json.loads(line)
            waiting = self._answers.get(found["id"])
            if waiting is None or waiting.done():
                continue
            if "error" in found:
                waiting.set_exception(PageError(found["status"], found["error"]))
            else:
                waiting.set_result(found["answer"])
        await process.wait()
        if process is self.process:
            for waiting in self._answers.values():
                if not waiting.done():
                    waiting.set_exception(
                        PageError(500, "The helper process ended; {log} says why. Try again.", log=self.log)
                    )

    async def warm(self) -> None:
        """Start the process ahead of the first question."""
        self._asked = asyncio.get_running_loop().time()
        await self._running()

    async def rest(self) -> None:
        """End the process where nothing was asked for long."""
        if self.process is not None and not self._answers and asyncio.get_running_loop().time() - self._asked > IDLE:
            await self.end()

    async def end(self) -> None:
        """End the process."""
        process, self.process = self.process, None
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                process.kill()
            await process.wait()
