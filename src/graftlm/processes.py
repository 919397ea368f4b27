"""Several processes of one run, as `torchrun`, `accelerate launch` or `srun` start them: the first, and what all agree on.

torchrun and accelerate set WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; a step of SLURM (`srun`) and MPI
(`mpirun`) have names of their own for the first three.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from .errors import GraftError, UnsupportedError

T = TypeVar("T")


def _started() -> Any:
    """torch.distributed where the processes of this run know each other already."""
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    return distributed if distributed is not None and distributed.is_available() and distributed.is_initialized() else None


# Names by launcher: how many, which, which on its machine.
LAUNCHERS = (
    ("WORLD_SIZE", "RANK", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
)


def _told() -> tuple[int, int, int]:
    """What the launcher says of this process: how many there are, which it is, which on its machine."""
    names = next((names for names in LAUNCHERS if os.environ.get(names[0])), None)
    size, rank, local = (int(os.environ.get(name) or 0) for name in names) if names else (1, 0, 0)
    return (size, rank, local) if size > 1 else (1, 0, 0)


def count() -> int:
    """How many processes this run has."""
    started = _started()
    if started:
        return int(started.get_world_size())
    return _told()[0]


def index() -> int:
    """Which of them this one is, from 0."""
    started = _started()
    return int(started.get_rank()) if started else _told()[1]


def is_first() -> bool:
    """Whether this process prints and saves."""
    return index() == 0


def join(cpu: bool) -> None:
    """Let the processes of this run know each other, each on its own GPU unless on `cpu`; nothing where there is one.

    Raises:
        UnsupportedError: they do not find each other: an address or a port that cannot be had, or a step of SLURM on several
            nodes without MASTER_ADDR. Or accelerate was asked for several processes and started one.
    """
    if count() == 1 and {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ:
        raise UnsupportedError(
            "accelerate launch was asked for several processes and started one: on CPUs it leaves that to mpirun. Use "
            "graftlm train --processes N, torchrun --nproc-per-node N -m graftlm train …, or accelerate launch --multi_gpu "
            "(which starts processes without GPUs, too). For one process, unset MASTER_ADDR."
        )
    if count() == 1 or _started():
        return
    if "WORLD_SIZE" not in os.environ:
        os.environ.update(_variables())
    from accelerate import PartialState

    try:
        PartialState(cpu=cpu)
    except (RuntimeError, ValueError, OSError) as error:
        place = ":".join(os.environ.get(name, f"({name} is not set)") for name in ("MASTER_ADDR", "MASTER_PORT"))
        text = str(error).strip().splitlines() or [""]
        raise UnsupportedError(
            f"the {count()} processes of this run do not find each other at {place} ({type(error).__name__}: {text[0]}). "
            "Where another program has that port, set MASTER_PORT (torchrun: --master-port) to a free one; MASTER_ADDR must "
            "be a machine that all of them reach."
        ) from error


def _variables() -> dict[str, str]:
    """What torch.distributed asks for, where SLURM or MPI started this. The port goes with the job, so that two of them can
    share a node."""
    address = os.environ.get("MASTER_ADDR")
    if address is None:
        if int(os.environ.get("SLURM_STEP_NUM_NODES") or 1) > 1:
            raise UnsupportedError(
                "srun started this run on several nodes: set MASTER_ADDR to the first of them before srun, by export "
                'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
            )
        address = "127.0.0.1"
    port = os.environ.get("MASTER_PORT") or str(20000 + int(os.environ.get("SLURM_JOB_ID") or 0) % 20000)
    numbers = dict(zip(LAUNCHERS[0], map(str, _told()), strict=True))
    return numbers | {"MASTER_ADDR": address, "MASTER_PORT": port}


def wait() -> None:
    """Until every process of the run is here."""
    started = _started()
    if started and count() > 1:
        started.barrier()


def gathered(value: Any) -> list[Any]:
    """What each process gives, in their order; all must call this."""
    started = _started()
    if started is None or count() == 1:
        return [value]
    every: list[Any] = [None] * count()
    started.all_gather_object(every, value)
    return every


def anywhere(flag: bool) -> bool:
    """Whether any process says so; all must call this."""
    return any(gathered(flag))


def of_first(action: Callable[[], T]) -> T | None:
    """Let the first process act, and the others wait; its result there, None elsewhere.

    Raises:
        GraftError: the first process's, in every process.
    """
    result, error = None, None
    if is_first():
        try:
            result = action()
        except GraftError as raised:
            error = raised
    told = gathered(error)[0]
    if told is not None:
        raise told
    return result


def leave() -> None:
    """End what the processes of this run share, after which nothing is printed at the exit."""
    started = _started()
    if started:
        started.destroy_process_group()
