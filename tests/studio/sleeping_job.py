"""A job's process whose command is not graftlm's: it sleeps, fails or ends at once, by its first argument."""

from __future__ import annotations

import sys
import time

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
    if what == "fail":
        print("Error: nothing of it is here", file=sys.stderr)
        return 2
    print("args", *args)
    return 0


job.call = call
job.Jobs.program = (sys.executable, __file__)
if __name__ == "__main__":
    raise SystemExit(job.main(*sys.argv[1:]))
