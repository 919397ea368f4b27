"""What a training needs of its process: other processes, threads, Ctrl-C, who may print."""

from __future__ import annotations

import io
import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch

from .. import processes
from .arguments import has_accelerator

log = logging.getLogger("graftlm.training.trainer")  # of all that is said while a model is trained


def join_processes() -> None:
    """Let the processes that torchrun or accelerate started know each other, each on its own GPU where there are any."""
    if processes.count() > 1:
        from accelerate import PartialState

        PartialState(cpu=not has_accelerator())


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
def interrupts_go_to(handler: Any) -> Iterator[None]:
    """Within the block Ctrl-C calls `handler`. Only the main thread can do that; elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.default_int_handler)
