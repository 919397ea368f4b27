"""Jobs: processes of their own, one at a time, that outlive the studio.

A job is a folder of `runs/` with a job.json: what `graftlm …` is called with, in the workspace. What waits or goes on has a
file in `queue/`, by time; whoever sees that there is room starts the next: the studio, or a job's own process at its end, so
the queue goes on when nobody watches. A lock keeps two of them apart.

    state.json   {"state": "waiting" | "running" | "stopping" | "done" | "stopped" | "failed" | "lost", …}

"lost" is a process that ended without a word (killed, out of memory, machine off). A process is known by its id and the time
at which it began: ids are used again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from . import records
from .errors import PageError
from .workspace import Workspace

JOB, STATE, LOG, OUT = "job.json", "state.json", "log.txt", "out"
UNFINISHED, ENDED = ("waiting", "running", "stopping"), ("done", "stopped", "failed", "lost")
LOST = "The process ended without a word: killed, out of memory, or the machine went off."


class Jobs:
    """The queue of a workspace.

    Args:
        at_once: jobs that may go on at a time.
    """

    program = (sys.executable, "-m", "graftlm.studio.job")

    def __init__(self, workspace: Workspace, at_once: int = 1) -> None:
        self.workspace, self.at_once = workspace, at_once
        self.lock = FileLock(workspace.queue / ".lock")
        self._children: list[subprocess.Popen] = []

    # -- what users ask ----------------------------------------------------------------------------------------------------
    def add(self, folder: Path, kind: str, args: Sequence[str], **told: Any) -> None:
        """Put a run's folder into the queue. args: of `graftlm`, in the workspace. told: kept in job.json."""
        records.write(folder / JOB, {"kind": kind, "args": list(args), "created": time.time()} | told)
        self._queue(folder, list(args))

    def again(self, folder: Path, *more: str) -> None:
        """Queue a job that has ended once more, with further arguments (`--resume`).

        Raises:
            PageError: it has not ended, or was not made here.
        """
        job = records.read(folder / JOB)
        if not job:
            raise PageError(409, f"{folder.name} was not started from the studio; go on with it on the command line.")
        if state_of(folder).get("state") not in ENDED:
            raise PageError(409, f"{folder.name} has not ended.")
        self._queue(folder, [*job["args"], *more])

    def _queue(self, folder: Path, args: list[str]) -> None:
        now = time.time()
        records.write(folder / STATE, {"state": "waiting", "queued": now})
        entry = {"folder": folder.name, "args": args, "queued": now}
        records.write(self.workspace.queue / f"{time.time_ns():020}-{folder.name}.json", entry)
        self.advance()

    def stop(self, folder: Path, at_once: bool = False) -> None:
        """As Ctrl-C: training ends its step and saves. at_once: kill. One that waits is taken out of the queue.

        Raises:
            PageError: it does not go on.
        """
        with self.lock:
            found = next((e for e in self._entries() if e[1]["folder"] == folder.name), None)
            if found is None:
                raise PageError(409, f"{folder.name} is not running.")
            file, entry = found
            if "pid" not in entry:
                file.unlink()
                records.write(folder / STATE, {"state": "stopped", "ended": time.time(), "queued": entry["queued"]})
                return
            if not alive(entry):
                return
            records.write(folder / STATE, records.read(folder / STATE) | {"state": "stopping"})
            if at_once:
                os.killpg(entry["pid"], signal.SIGKILL)
            else:
                os.kill(entry["pid"], signal.SIGINT)

    def leave(self, folder: Path) -> None:
        """For a job's own process at its end: make room, and start what waits next."""
        with self.lock:
            for file, entry in self._entries():
                if entry["folder"] == folder.name:
                    file.unlink()
        self.advance()

    # -- the queue ---------------------------------------------------------------------------------------------------------
    def advance(self) -> list[Path]:
        """Settle jobs whose processes are gone, and start what waits while there is room; folders whose state changed."""
        self._children = [child for child in self._children if child.poll() is None]
        changed = []
        with self.lock:
            entries = self._entries()
            for file, entry in entries:
                if "pid" in entry and not alive(entry):
                    folder = self.workspace.runs / entry["folder"]
                    settle(folder)
                    file.unlink()
                    changed.append(folder)
            going = self._entries()
            room = self.at_once - sum("pid" in entry for _, entry in going)
            for file, entry in [e for e in going if "pid" not in e[1]][: max(room, 0)]:
                self._start(file, entry)
                changed.append(self.workspace.runs / entry["folder"])
        return changed

    def _entries(self) -> list[tuple[Path, dict[str, Any]]]:
        """What waits or goes on, oldest first; without runs whose folders are gone."""
        found = []
        for file in sorted(self.workspace.queue.glob("*.json")):
            entry = records.read(file)
            if (self.workspace.runs / str(entry.get("folder"))).is_dir():
                found.append((file, entry))
            else:
                file.unlink()
        return found

    def waiting(self) -> list[str]:
        """Names of the runs that wait, in their order."""
        return [entry["folder"] for _, entry in self._entries() if "pid" not in entry]

    def going(self) -> list[str]:
        """Names of the runs that go on."""
        return [entry["folder"] for _, entry in self._entries() if "pid" in entry]

    def _start(self, file: Path, entry: dict[str, Any]) -> None:
        folder = self.workspace.runs / entry["folder"]
        command = [*self.program, str(self.workspace.root), folder.name, str(self.at_once)]
        records.write(folder / STATE, {"state": "running", "queued": entry["queued"], "started": time.time()})
        with (folder / LOG).open("ab") as log:
            child = subprocess.Popen(
                [*command, *entry["args"]], cwd=self.workspace.root, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self._children.append(child)
        records.write(file, entry | identity(child.pid))


def identity(pid: int) -> dict[str, Any]:
    """What tells a process from others, also from a later one with the same id."""
    try:
        return {"pid": pid, "born": psutil.Process(pid).create_time()}
    except psutil.NoSuchProcess:  # it has ended already
        return {"pid": pid, "born": 0.0}


def alive(entry: dict[str, Any]) -> bool:
    """Whether the process of an entry is there, and is that one."""
    try:
        found = psutil.Process(entry["pid"])
        return abs(found.create_time() - entry["born"]) < 1 and found.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def settle(folder: Path) -> None:
    """After its process: a job that did not say how it ended is lost."""
    state = records.read(folder / STATE)
    if state.get("state") not in ENDED:
        records.write(folder / STATE, state | {"state": "lost", "ended": time.time(), "error": LOST})


def state_of(folder: Path) -> dict[str, Any]:
    """A run's state; that of one made on the command line is read off what it wrote."""
    found = records.read(folder / STATE)
    if found:
        return found
    return {"state": "done" if (folder / "metrics.json").exists() else "unknown"}
