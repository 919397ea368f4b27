"""The plan's line before a run, and what is said of a run that exhausts memory all the same."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import ExhaustedError, GraftError
from ..kernels import release_freed_memory
from ..training.meters import memory_now, peak_memory
from ..training.schema import Recipe
from .devices import device
from .machine import Machine, known
from .mends import changes
from .rows import Rows, rows_of
from .sizes import base_parameters
from .skeleton import config_of, skeleton
from .whole import Plan, joined, single, size

SMALL = 50_000_000  # parameters of a base whose plan takes about as long as a short run
LONG = 5.0  # seconds of planning that are told
BESIDES = 110 << 20  # bytes that a process takes above its libraries, where the machine is not measured


def ahead(recipes: Sequence[Recipe], say: Any) -> tuple[Plan | None, Rows | None]:
    """Say a run's plan in a line; it and the first recipe's rows. Nothing is planned of a small base, and a plan that cannot
    be made is told: the run says itself what is wrong with it.

    Args:
        say: is given the line.
    """
    start, rows = time.perf_counter(), None
    try:
        recipe = recipes[0]
        config, path = config_of(recipe)
        if base_parameters(skeleton(recipe, config, path).model) < SMALL:
            return None, None
        place, plans = device("cuda" if torch.cuda.is_available() else "cpu"), []
        for each in recipes:
            found = rows_of(each)
            rows = rows or found
            plans.append(single(each, place, found, measured_or_assumed))
        planned = joined(plans) if len(plans) > 1 else plans[0]
    except GraftError as error:
        say(f"This run is not planned: {error}")
        return None, None
    except Exception as error:  # planning must not keep a run from being made
        say(f"This run is not planned: {type(error).__name__}: {error}")
        return None, None
    finally:
        release_freed_memory()
    spent = time.perf_counter() - start
    long = f" (planned in {spent:.0f} s; --no-plan leaves it out)" if spent > LONG else ""
    advice = "" if planned.fits else "\nIt may end for lack of memory: graftlm plan says what to change."
    say(f"{planned.line()}{long}{advice}")
    return planned, rows


def measured_or_assumed(form: str) -> Machine:
    """The machine's figures, where it was measured; else this process's memory, and rates of a slow processor."""
    assumed = Machine(
        process_bytes=memory_now() + BESIDES, start_bytes=memory_now(), operations=5e10, step_operations=2.5e10,
        block_seconds=0.02,
    )  # fmt: skip
    return known(form) or assumed


@contextmanager
def memory_watched(planned: Plan | None, folder: str) -> Iterator[None]:
    """Within the block, a lack of memory ends with what was planned, what was taken, and what to change.

    Args:
        folder: where the run saves.

    Raises:
        ExhaustedError: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not exhausted(error):
            raise
        raise ExhaustedError(explained(planned, folder, error)) from error


def exhausted(error: BaseException) -> bool:
    """Whether an error is a lack of memory: Python's, CUDA's, or the one of torch's allocator on a CPU."""
    text = str(error).lower()
    named = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return named or any(part in text for part in ("can't allocate memory", "not enough memory", "out of memory"))


def explained(planned: Plan | None, folder: str, error: BaseException) -> str:
    """What an `ExhaustedError` says."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    plan = "It was not planned"
    mend = "graftlm plan says what a run takes, and what to change"
    if planned is not None:
        plan = f"Planned were {size(planned.peak_bytes)} of {size(planned.device.free_bytes)} that were free"
        entries = [" ".join(entries) for _, entries in list(changes(planned))[:6]]
        mend = f"change one of these (--set), the cheapest first: {'; '.join(entries)}. graftlm plan has each one's memory"
    return (
        f"memory ran out ({first}). {plan}, and the process had taken at most {size(peak_memory())}. To mend it, {mend}. "
        f"What was saved in {folder} stays; where it holds a checkpoint, --resume goes on from it."
    )
