"""Jobs: processes of their own, one at a time, that outlive the studio.

A job is a folder of `runs/` with a job.json: what `graftlm …` is called with, in the workspace. Runs that train together are
one job of several folders, whose log is in the first. What waits or goes on has a file in `queue/`, by time; whoever sees
that there is room starts the next: the studio, or a job's own process at its end, so the queue goes on when nobody watches.
A lock keeps two of them apart.

    state.json   {"state": "waiting" | "running" | "stopping" | "done" | "stopped" | "failed" | "lost", …}

"lost" is a process that ended without a word (killed, out of memory, machine off). A process is known by its id and the time
at which it began: ids are used again.

A job starts beside others where so many may go at once, or a user asked for it, and the plans of all leave room for it
(`needs`, in bytes; see `fits`). One that has no plan goes alone.
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
ORIGIN = "origin.json"  # of an adapter that was not trained here: from where, and its base
UNFINISHED, ENDED = ("waiting", "running", "stopping"), ("done", "stopped", "failed", "lost")
LOST = "The process ended without a word: killed, out of memory, or the machine went off."
EXHAUSTED = "The process was ended from outside, while the system was ending processes for lack of memory."
KILLS = ("/proc/vmstat", "/sys/fs/cgroup/memory.events")  # where Linux counts what it ended for lack of memory


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
    def add(self, folders: Path | Sequence[Path], kind: str, args: Sequence[str], **told: Any) -> None:
        """Put a run's folder into the queue, or those of runs that train together.

        Args:
            args: of `graftlm`, in the workspace; what is in a run's folder begins with `runs/NAME/`.
            told: kept in job.json.
        """
        folders = [folders] if isinstance(folders, Path) else list(folders)
        told |= {"together": [f.name for f in folders]} if len(folders) > 1 else {}
        for folder in folders:
            records.write(folder / JOB, {"kind": kind, "args": list(args), "created": time.time()} | told)
        self._queue(folders, list(args))

    def again(self, folder: Path, *more: str) -> None:
        """Queue a job that has ended once more, with further arguments (`--resume`), and what trained together with it and
        did not come to its end either.

        Raises:
            PageError: it has not ended, or was not made here.
        """
        job = records.read(folder / JOB)
        if not job:
            raise PageError(
                409, "{name} was not started from the studio; go on with it on the command line.", name=folder.name
            )
        if state_of(folder).get("state") not in ENDED:
            raise PageError(409, "{name} has not ended.", name=folder.name)
        names = job.get("together", [folder.name])
        found = [f for f in map(self.workspace.runs.joinpath, names) if f == folder or cut_short(f)]
        left = tuple(f"runs/{name}/" for name in names if name not in {f.name for f in found})
        self._queue(found, [*(a for a in job["args"] if not a.startswith(left)), *more])

    def _queue(self, folders: list[Path], args: list[str]) -> None:
        now, names = time.time(), [f.name for f in folders]
        for folder in folders:
            records.write(folder / STATE, {"state": "waiting", "queued": now, "log": names[0]})
        entry = {"folders": names, "args": args, "queued": now}
        records.write(self.workspace.queue / f"{time.time_ns():020}-{names[0]}.json", entry)
        self.advance()

    def stop(self, folder: Path, at_once: bool = False) -> None:
        """As Ctrl-C: training ends its step and saves. at_once: kill. One that waits is taken out of the queue. What trains
        together is stopped together.

        Raises:
            PageError: it does not go on.
        """
        with self.lock:
            file, entry = self._entry_of(folder)
            if "pid" not in entry:
                file.unlink()
                for own in self._folders(entry):
                    records.write(own / STATE, records.read(own / STATE) | {"state": "stopped", "ended": time.time()})
                return
            if not alive(entry):
                return
            for own in self._folders(entry):
                records.write(own / STATE, records.read(own / STATE) | {"state": "stopping"})
            if at_once:
                os.killpg(entry["pid"], signal.SIGKILL)
            else:
                os.kill(entry["pid"], signal.SIGINT)

    def beside(self, folder: Path) -> None:
        """Start one that waits beside those that go on, as soon as the plans say that there is room.

        Raises:
            PageError: it does not wait.
        """
        with self.lock:
            file, entry = self._entry_of(folder)
            records.write(file, entry | {"beside": True})
        self.advance()

    def note_plan(self, file: Path, needs: int | None) -> None:
        """Write down what a job of the queue needs at most, in bytes; None: there is no plan of it."""
        with self.lock:
            if file.exists():  # else it has ended meanwhile
                records.write(file, records.read(file) | {"needs": needs})

    def leave(self, folder: Path) -> None:
        """For a job's own process at its end: make room, and start what waits next."""
        with self.lock:
            for file, entry in self.entries():
                if folder.name in entry["folders"]:
                    file.unlink()
        self.advance()

    # -- the queue ---------------------------------------------------------------------------------------------------------
    def advance(self) -> list[Path]:
        """Settle jobs whose processes are gone, and start what waits while there is room; folders whose state changed."""
        self._children = [child for child in self._children if child.poll() is None]
        changed = []
        with self.lock:
            for file, entry in self.entries():
                if "pid" in entry and not alive(entry):
                    for folder in self._folders(entry):
                        settle(folder)
                        changed.append(folder)
                    file.unlink()
            found = self.entries()
            going = [entry for _, entry in found if "pid" in entry]
            for file, entry in found:
                if "pid" in entry:
                    continue
                if not self._room(entry, going):
                    break
                going.append(self._start(file, entry))
                changed += self._folders(entry)
        return changed

    def _room(self, entry: dict[str, Any], going: list[dict[str, Any]]) -> bool:
        """Whether a job may start beside those that go on."""
        if not going:
            return True
        return (len(going) < self.at_once or entry.get("beside", False)) and fits(entry, going)

    def entries(self) -> list[tuple[Path, dict[str, Any]]]:
        """What waits or goes on, oldest first: files with what is in them; without runs whose folders are gone."""
        found = []
        for file in sorted(self.workspace.queue.glob("*.json")):
            entry = records.read(file)
            if any(folder.is_dir() for folder in self._folders(entry)):
                found.append((file, entry))
            else:
                file.unlink()
        return found

    def _entry_of(self, folder: Path) -> tuple[Path, dict[str, Any]]:
        found = next((e for e in self.entries() if folder.name in e[1]["folders"]), None)
        if found is None:
            raise PageError(409, "{name} is not running.", name=folder.name)
        return found

    def _folders(self, entry: dict[str, Any]) -> list[Path]:
        return [self.workspace.runs / name for name in entry.get("folders", ())]

    def waiting(self) -> list[str]:
        """Names of the runs that wait, in their order."""
        return [name for _, entry in self.entries() if "pid" not in entry for name in entry["folders"]]

    def going(self) -> list[str]:
        """Names of the runs that go on."""
        return [name for _, entry in self.entries() if "pid" in entry for name in entry["folders"]]

    def _start(self, file: Path, entry: dict[str, Any]) -> dict[str, Any]:
        """Start a job; its entry with its process."""
        folders = self._folders(entry)
        command = [*self.program, str(self.workspace.root), "/".join(entry["folders"]), str(self.at_once)]
        for folder in folders:
            now = {"state": "running", "started": time.time(), "kills": kills()}
            records.write(folder / STATE, records.read(folder / STATE) | now)
        with (folders[0] / LOG).open("ab") as log:
            child = subprocess.Popen(
                [*command, *entry["args"]], cwd=self.workspace.root, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self._children.append(child)
        entry |= identity(child.pid)
        records.write(file, entry)
        return entry


def cut_short(folder: Path) -> bool:
    """Whether a run has ended, and not as it should."""
    return folder.is_dir() and state_of(folder).get("state") in ENDED[1:]


def log_of(folder: Path) -> Path:
    """A run's log: the first run's, where several train together."""
    return folder.with_name(records.read(folder / STATE).get("log", folder.name)) / LOG


def fits(entry: dict[str, Any], going: Sequence[dict[str, Any]]) -> bool:
    """Whether the plans leave room for a job beside those that go on: in the memory that is free, less what those will still
    take. One without a plan fits beside nothing, and nothing beside it."""
    if any(one.get("needs") is None for one in (entry, *going)):
        return False
    ahead = sum(max(0, other["needs"] - taken(other["pid"])) for other in going)
    return bool(entry["needs"] <= psutil.virtual_memory().available - ahead)


def taken(pid: int) -> int:
    """Bytes that a process and those that it started hold."""
    try:
        process = psutil.Process(pid)
        return sum(p.memory_info().rss for p in (process, *process.children(recursive=True)))
    except psutil.Error:  # it ended meanwhile
        return 0


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
    """After its process: a job that did not say how it ended was stopped, where that was asked for, or is lost."""
    state = records.read(folder / STATE)
    if state.get("state") == "stopping":
        records.write(folder / STATE, state | {"state": "stopped", "ended": time.time()})
    elif state.get("state") not in ENDED:
        error = EXHAUSTED if kills() > state.get("kills", float("inf")) else LOST
        records.write(folder / STATE, state | {"state": "lost", "ended": time.time(), "error": error})


def kills() -> int:
    """How many processes the system ended for lack of memory, as far as it tells."""
    found = [line.split() for path in map(Path, KILLS) if path.is_file() for line in path.read_text().splitlines()]
    return sum(int(value) for key, value in found if key == "oom_kill")


def state_of(folder: Path) -> dict[str, Any]:
    """A run's state; that of one made on the command line is read off what it wrote."""
    found = records.read(folder / STATE)
    if found:
        return found
    whole = (folder / "metrics.json").exists() or (folder / ORIGIN).exists()
    return {"state": "done" if whole else "unknown"}


def kind_of(folder: Path) -> str:
    """What made a run: a job's kind, "import", or the command line's training."""
    otherwise = "import" if (folder / ORIGIN).exists() else "train"
    return str(records.read(folder / JOB).get("kind", otherwise))
