"""The process of a job: runs `graftlm …` in itself, says how it ended, and starts what waits next.

python -m graftlm.studio.job WORKSPACE NAME AT_ONCE ARGUMENTS…          NAME/NAME of runs that train together
"""

from __future__ import annotations

import runpy
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from . import records
from .jobs import JOB, LOG, OUT, STATE, Jobs
from .workspace import Workspace

ENDS = {0: "done", 130: "stopped"}  # of exit codes; all others are "failed"
BOX = "╭─╮│╰╯ "  # around what a command line refuses
TAIL = 4000  # characters of the log that hold what went wrong


def main(root: str, names: str, at_once: str, *args: str) -> int:
    """Run the command to its end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started with it ignored
    workspace = Workspace(root)
    folders = [workspace.runs / name for name in names.split("/")]
    code = call(args)
    sys.stdout.flush()
    sys.stderr.flush()
    if code == 0 and records.read(folders[0] / JOB).get("lift"):
        lift(folders[0])
    for folder in folders:
        ended(folder, code, folders[0] / LOG)
    Jobs(workspace, int(at_once)).leave(folders[0])
    return code


def ended(folder: Path, code: int, log: Path) -> None:
    """Write down how a run ended. Of several, those that came to their ends are done, whatever became of the others."""
    state = records.read(folder / STATE)
    together = "together" in records.read(folder / JOB)
    done = code == 0 or together and finished(folder, state)
    state |= {"state": "done" if done else ENDS.get(code, "failed"), "code": code, "ended": time.time()}
    state.pop("error", None)
    if state["state"] == "failed":
        state["error"] = last_words(log, f"\nruns/{folder.name}: " if together else "")
    records.write(folder / STATE, state)


def finished(folder: Path, state: dict[str, Any]) -> bool:
    """Whether a run wrote its measures since it was started, which it does at its end."""
    try:
        return (folder / "metrics.json").stat().st_mtime >= state.get("started", 0.0)
    except FileNotFoundError:
        return False


def lift(folder: Path) -> None:
    """Put what a command wrote into its directory `out` beside the job's own files: an adapter is found by its folder."""
    for path in (folder / OUT).iterdir():
        path.rename(folder / path.name)
    (folder / OUT).rmdir()


def call(args: tuple[str, ...]) -> int:
    """`graftlm ARGS` in this process; its exit code."""
    sys.argv = ["graftlm", *args]
    try:
        runpy.run_module("graftlm", run_name="__main__", alter_sys=False)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except KeyboardInterrupt:
        return 130
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def last_words(log: Path, own: str = "") -> str:
    """What a log says at its end about what went wrong: from its last "Error:" on, or its last line. own: what lines about
    this run begin with; where it ends with such lines of several runs, what this one's says."""
    text = log.read_bytes()[-TAIL:].decode("utf-8", "replace").strip()
    _, found, rest = text.rpartition(own) if own else ("", "", "")
    if found and not rest.startswith("starts"):
        return rest.partition("\nruns/")[0].strip()
    _, found, rest = text.rpartition("Error: ")
    if found:
        return rest.strip()
    lines = [line.strip("│ ") for line in text.splitlines() if line.strip(BOX)]
    return lines[-1] if lines else ""


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
