"""What a training needs of its process: other processes, threads, Ctrl-C and SIGTERM, who may print."""

from __future__ import annotations

import io
import logging
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch

from .. import processes
from ..errors import UnsupportedError
from .arguments import has_accelerator

log = logging.getLogger("graftlm.training.trainer")  # of all that is said while a model is trained


def join_processes() -> None:
    """Let the processes of a run (torchrun, accelerate, srun) know each other, each on its own GPU where there are any."""
    processes.join(cpu=not has_accelerator())


def check_agreement(facts: dict[str, str]) -> None:
    """Compare what must be the same in every process of a run, by name: its recipe, rows, versions.

    Raises:
        UnsupportedError: some process has another.
    """
    every = processes.gathered(facts)
    for name, own in every[0].items():
        other = next((i for i, theirs in enumerate(every) if theirs.get(name) != own), None)
        if other is not None:
            raise UnsupportedError(
                f"{name}: {own[:60]} in process 0, {every[other].get(name, 'none')[:60]} in process {other}. All processes "
                "of a run must read the same recipe and data, with the same versions; nothing was trained."
            )


@contextmanager
def only_the_first_speaks() -> Iterator[None]:
    """Within the block the other processes of a run print no lines, warnings and notices; errors they raise as ever."""
    if processes.is_first():
        yield
        return
    logger = logging.getLogger("graftlm")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Within the block torch runs on `count` CPU threads."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def interrupts_go_to(handler: Callable[[], None]) -> Iterator[None]:
    """Within the block Ctrl-C calls `handler`, and so does SIGTERM (a scheduler's, a container's, a launcher's) where
    nothing did before: a launcher passes on what the terminal has sent already. Only the main thread can do that; elsewhere
    nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = False

    def told(number: int, frame: Any) -> None:
        nonlocal came
        if number == signal.SIGINT or not came:
            came = True
            handler()

    before = {number: signal.signal(number, told) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, own in before.items():
            signal.signal(number, own if own is not None else signal.default_int_handler)
