"""Several processes of one run, as `torchrun` and `accelerate launch` start them: which is the first, and waiting."""

from __future__ import annotations

import os
import sys


def _started() -> object | None:
    """torch.distributed where the processes of this run know each other already."""
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    return distributed if distributed is not None and distributed.is_available() and distributed.is_initialized() else None


def count() -> int:
    """How many processes this run has."""
    started = _started()
    return started.get_world_size() if started else int(os.environ.get("WORLD_SIZE") or 1)  # type: ignore[attr-defined]


def index() -> int:
    """Which of them this one is, from 0."""
    started = _started()
    if started:
        return int(started.get_rank())  # type: ignore[attr-defined]
    return int(os.environ.get("RANK") or 0) if count() > 1 else 0


def is_first() -> bool:
    """Whether this process prints and saves."""
    return index() == 0


def wait() -> None:
    """Until every process of the run is here."""
    started = _started()
    if started and count() > 1:
        started.barrier()  # type: ignore[attr-defined]


def leave() -> None:
    """End what the processes of this run share, after which nothing is printed at the exit."""
    started = _started()
    if started:
        started.destroy_process_group()  # type: ignore[attr-defined]
