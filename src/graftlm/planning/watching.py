"""The plan's line before a run, and what is said of a run that exhausts memory all the same."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import ExhaustedError, GraftError
from ..kernels import release_freed_memory
from ..training.meters import memory_now, peak_memory
from ..training.schema import Recipe
from ..training.setup import RunData
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


def ahead(recipes: Sequence[Recipe], say: Any, at_once: int | None = None) -> tuple[Plan | None, RunData | None]:
    """Say in a line the plan of a run, or of several that train together; it and the first one's data. Of a small base
    nothing is planned. What cannot be planned is told: the run says itself what is wrong with it.

    Args:
        say: is given the line.
        at_once: how many train at a time; the heaviest ones are planned so. None: all.
    """
    start, rows, assumed = time.perf_counter(), None, set[str]()

    def figures(form: str) -> Machine:
        if known(form) is None:
            assumed.add(form)
        return measured_or_assumed(form)

    try:
        if not recipes or is_small(recipes[0]):
            return None, None
        place, groups = device("cuda" if torch.cuda.is_available() else "cpu"), dict[Any, list[Plan]]()
        for each in recipes:
            same = rows if rows is not None and like(each, recipes[0]) else rows_of(each)
            rows = rows if rows is not None else same
            try:
                made = single(each, place, same, figures)
                groups.setdefault((each.base, each.quantization), []).append(made)
            except GraftError as error:
                say(f"{each.method} is not planned: {error}")
        if not groups:
            return None, data_of(rows)
        planned = heaviest(list(groups.values()), at_once)
    except Exception as error:  # planning must not keep a run from being made
        kind = "" if isinstance(error, GraftError) else f"{type(error).__name__}: "
        say(f"This run is not planned: {kind}{error}")
        return None, None
    finally:
        release_freed_memory()
    spent = time.perf_counter() - start
    long = f" (planned in {spent:.0f} s; --no-plan leaves it out)" if spent > LONG else ""
    advice = "" if planned.fits else "\nIt may end for lack of memory: graftlm plan says what to change."
    guess = " (this machine's figures are assumed; graftlm plan measures them)" if assumed else ""
    say(f"{planned.line()}{guess}{long}{advice}")
    return planned, data_of(rows)


def data_of(rows: Rows | None) -> RunData | None:
    """The data of rows, without the lists that planning makes of it."""
    return None if rows is None else rows.data


def is_small(recipe: Recipe) -> bool:
    """Whether a base is so small that its plan takes about as long as a short run."""
    config, path = config_of(recipe)
    return base_parameters(skeleton(recipe, config, path).model) < SMALL


def like(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes make the same rows."""
    return (one.data, one.base, one.training.seed) == (other.data, other.base, other.training.seed)


def heaviest(groups: Sequence[Sequence[Plan]], at_once: int | None) -> Plan:
    """The plan of the most memory of runs over one base each; its time is that of all."""
    made = [joined(sorted(group, key=lambda p: -p.step.kept)[:at_once]) for group in groups]
    times = [p.seconds for group in groups for p in group]
    least, expected, most = (sum(column) for column in zip(*times, strict=True))
    return dataclasses.replace(max(made, key=lambda p: p.peak_bytes), seconds=(least, expected, most))


def measured_or_assumed(form: str) -> Machine:
    """The machine's figures, where it was measured; else this process's memory, and rates of a slow processor."""
    assumed = Machine(
        process_bytes=memory_now() + BESIDES, start_bytes=memory_now(), step_operations=2.5e10,
        bandwidth=5e9, call_seconds=2e-5,
    )  # fmt: skip
    return known(form) or assumed


@contextmanager
def memory_watched(planned: Plan | None, folder: str, compared: bool = False) -> Iterator[None]:
    """Within the block, a lack of memory ends with what was planned, what was taken, and what to change.

    Args:
        folder, compared: see `explained`.

    Raises:
        ExhaustedError: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not exhausted(error):
            raise
        raise ExhaustedError(explained(planned, folder, error, compared)) from error


def exhausted(error: BaseException | str) -> bool:
    """Whether an error (or what was written down of it) is a lack of memory: Python's, CUDA's, or the one of torch's
    allocator on a CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    signs = ("memoryerror", "outofmemoryerror", "can't allocate memory", "not enough memory", "out of memory")
    return any(sign in str(error).lower() for sign in signs)


def explained(planned: Plan | None, folder: str, error: BaseException | str, compared: bool = False) -> str:
    """What an `ExhaustedError` says.

    Args:
        folder: where the run saves.
        error: the error, or what was written down of it.
        compared: the run is one of a comparison, which trains several at a time and does not resume.
    """
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    plan = "It was not planned"
    mend = "graftlm plan says what a run takes, and what to change"
    if planned is not None:
        plan = f"Planned were {size(planned.peak_bytes)} of {size(planned.device.free_bytes)} that were free"
        entries = [" ".join(entries) for _, entries in list(changes(planned))[:6]]
        mend = f"change one of these (--set), the cheapest first: {'; '.join(entries)}. graftlm plan has each one's memory"
    fewer = "train fewer at a time (--at-once); else " if compared else ""
    kept = "" if compared else "; where it holds a checkpoint, --resume goes on from it"
    return (
        f"memory ran out ({first}). {plan}, and the process had taken at most {size(peak_memory())}. "
        f"To mend it, {fewer}{mend}. What was saved in {folder} stays{kept}."
    )
