"""A job's process whose command is not graftlm's: it sleeps, fails or ends at once, by its first argument."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from graftlm.studio import job


def call(args: tuple[str, ...]) -> int:
    what, *rest = args
    if what == "sleep":
        try:
            print("asleep", flush=True)
            time.sleep(float(rest[0]))
        except KeyboardInterrupt:
            print("saved", flush=True)
            return 130
    if what == "several":  # as runs that train together, of which only the first one comes to its end
        print("runs/a: starts", "several", *rest)
        if "runs/a/settings.yaml" in rest:
            Path("runs/a/metrics.json").write_text("{}")
        print("runs/b: there are no rows\nruns/c: there is no base")
        return 1
    if what == "fail":
        print("Error: nothing of it is here", file=sys.stderr)
        return 2
    print("args", *args)
    return 0


job.call = call
job.Jobs.program = (sys.executable, __file__)
if __name__ == "__main__":
    raise SystemExit(job.main(*sys.argv[1:]))
