"""The process of a job: runs `graftlm …` in itself, says how it ended, and starts what waits next.

python -m graftlm.studio.job WORKSPACE NAME AT_ONCE ARGUMENTS…
"""

from __future__ import annotations

import runpy
import signal
import sys
import time
import traceback
from pathlib import Path

from . import records
from .jobs import JOB, LOG, OUT, STATE, Jobs
from .workspace import Workspace

ENDS = {0: "done", 130: "stopped"}  # of exit codes; all others are "failed"
TAIL = 4000  # characters of the log that hold what went wrong


def main(root: str, name: str, at_once: str, *args: str) -> int:
    """Run the command to its end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started with it ignored
    workspace = Workspace(root)
    folder = workspace.runs / name
    code = call(args)
    sys.stdout.flush()
    sys.stderr.flush()
    if code == 0 and records.read(folder / JOB).get("lift"):
        lift(folder)
    state = records.read(folder / STATE) | {"state": ENDS.get(code, "failed"), "code": code, "ended": time.time()}
    if state["state"] == "failed":
        state["error"] = last_words(folder / LOG)
    records.write(folder / STATE, state)
    Jobs(workspace, int(at_once)).leave(folder)
    return code


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


def last_words(log: Path) -> str:
    """What a log says at its end about what went wrong: from its last "Error:" on, or its last line."""
    text = log.read_bytes()[-TAIL:].decode("utf-8", "replace").strip()
    _, found, rest = text.rpartition("Error: ")
    return rest.strip() if found else text.splitlines()[-1] if text else ""


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
