"""`graftlm train --processes N`: torch's own launcher over the same recipe."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from .. import processes
from ..errors import ConfigError

if TYPE_CHECKING:
    from ..training import Recipe

MISTAKE = 2  # exit code of what is wrong with a recipe, as with one process


def launch(recipes: list[Recipe], count: int, *, quiet: bool, progress: bool = False) -> int:
    """Train recipes in `count` processes of this machine, each on its share of the batches; the launcher's exit code.

    Each process has its share of the processor's cores, where OMP_NUM_THREADS says nothing else. Ctrl-C and SIGTERM reach
    all of them: they end the running step and save once.

    Raises:
        ConfigError: fewer than one process, or this is one of several already.
    """
    if count < 1:
        raise ConfigError(f"--processes {count}: expected at least 1, the number of processes that train together.")
    if processes.count() > 1:
        raise ConfigError(
            f"--processes {count}, and {processes.count()} processes were started already (torchrun, accelerate launch, "
            "srun); leave it out there."
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {"OMP_NUM_THREADS": str(max(1, cores // count))} | os.environ
    from ..training.surroundings import interrupts_go_to

    with tempfile.TemporaryDirectory(prefix="graftlm-") as folder:
        files = [Path(folder) / f"recipe-{i}.yaml" for i in range(len(recipes))]
        for file, recipe in zip(files, recipes, strict=True):
            file.write_text(recipe.to_yaml(), encoding="utf-8")
        launcher = [sys.executable, "-m", __name__, "--standalone", f"--nproc_per_node={count}"]
        command = [*launcher, "-m", "graftlm", "train", *map(str, files), *(["--quiet"] if quiet else [])]
        command += ["--progress"] if progress else []
        started = subprocess.Popen(command, env=environment)
        with interrupts_go_to(lambda: started.send_signal(signal.SIGTERM)):  # on which the launcher ends its processes
            code = started.wait()
    if code not in (0, MISTAKE):
        folders = ", ".join(recipe.output_dir for recipe in recipes)
        print(
            f"The processes ended with code {code}. Where {folders} has a checkpoint, the same line with --resume goes on "
            "from it.",
            file=sys.stderr,
        )
    return code


def torchrun() -> int:
    """Torch's launcher, by the words of this command line, without tracebacks of its own.

    Returns:
        The code of the process that failed first; 128 and a signal's number where that ended one, or the launcher.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main(sys.argv[1:])
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        # one that was killed goes before those that missed it, which the launcher may see first; it ends others by SIGTERM
        killed = [f for f in error.failures.values() if f.exitcode < 0 and -f.exitcode != signal.SIGTERM]
        failure = killed[0] if killed else error.get_first_failure()[1]
        if failure.exitcode >= 0:
            return int(failure.exitcode)
        print(f"Process {failure.local_rank} was ended by {failure.signal_name()}.", file=sys.stderr)
        return 128 - int(failure.exitcode)
    return 0


if __name__ == "__main__":
    sys.exit(torchrun())
