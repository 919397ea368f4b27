"""Work in threads that end with it.

A thread that multiplies keeps a team of OpenMP threads for as long as it lives. Where all teams together have more threads
than the machine has cores, GNU's OpenMP lets those that wait sleep at once, and whoever makes many small products (an
engine's step) waits for them to wake: nearly twice the time (docs/dev-log.md). So what comes before and beside an engine's
thread is done in threads that are gone when it steps.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


def begin(work: Callable[[], Any], name: str) -> threading.Thread:
    """Start `work` in a thread of its own, which does not keep the process alive."""
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    return thread


def apart(work: Callable[[], T]) -> T:
    """What `work` gives or raises, done in a thread that is gone afterwards."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    begin(run, "graftlm-apart").join()
    return done.result()
