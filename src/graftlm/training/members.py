"""One of several runs that train together: it goes on when it is given the turn, and waits for its passes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from greenlet import getcurrent, greenlet
from torch import Tensor

from .. import processes
from ..errors import DivergedError
from .callbacks import Request, TrainingInterrupted
from .results import RunResult
from .schema import Recipe


@dataclass
class Outcome:
    """What became of one run.

    Attributes:
        recipe: the run.
        result: of `graftlm.training.run`; None where it failed or was stopped.
        error: why there is no result.
    """

    recipe: Recipe
    result: RunResult | None = None
    error: BaseException | None = None


class Member:
    """One run. It goes on when it is given the turn, and gives it back when it waits, ends or fails."""

    def __init__(
        self, outcome: Outcome, work: Callable[[Member], RunResult], done: Callable[[Outcome], None] | None
    ) -> None:
        self.outcome = outcome
        self.request: Request | None = None
        self.trainer: Any = None
        self.ended = False
        self.base_bytes = 0
        self.state = State.now()
        self.done = done
        self._work = work
        self._greenlet = greenlet(self._run)
        self._seconds = 0.0
        self._since: float | None = None
        self.peak_memory: int | None = None  # at its first pass, which it makes alone, over what was there before all runs

    def spent(self) -> float:
        """Seconds of its own: its turns, and its part of the joint passes."""
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    def charge(self, seconds: float) -> None:
        """Add its part of a pass."""
        self._seconds += seconds

    def _run(self) -> None:
        try:
            self.outcome.result = self._work(self)
        except (Exception, TrainingInterrupted) as error:  # of this run only: the others go on
            self.outcome.error = error
        finally:
            self.ended = True

    def turn(self) -> None:
        """Let it go on until it waits for a pass or has ended."""
        self._greenlet.parent = getcurrent()
        self._since = time.perf_counter()
        try:
            with self.state.in_place():
                self._greenlet.switch()
        finally:
            self._seconds, self._since = self.spent(), None

    def step(self, request: Request) -> Tensor:
        """Called by the run: wait for a training pass; its loss, whose gradients are in place."""
        self.request = request
        self._greenlet.parent.switch()
        self.request = None
        loss: Any = request.loss
        failed = loss is None or not bool(torch.isfinite(loss))
        if request.error is not None:
            processes.anywhere(True)
            raise request.error
        if processes.anywhere(failed):
            raise DivergedError(
                f"{self.outcome.recipe.output_dir}: the loss is {loss} at step "
                f"{request.trainer.state.global_step + 1}; lower training.learning_rate, or look for broken rows in the data"
            )
        return loss


class State:
    """What belongs to the process and yet to one run: random generators, and where accelerate stands in its accumulation."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts  # of torch, numpy, Python, GPUs, accelerate

    @classmethod
    def now(cls) -> State:
        return cls(torch.get_rng_state(), np.random.get_state(), random.getstate(), _gpu_states(), dict(_gradient_state()))

    def put(self) -> None:
        torch_state, numpy_state, python_state, gpu_states, gradient_state = self.parts
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        if gpu_states:
            torch.cuda.set_rng_state_all(gpu_states)
        shared = _gradient_state()
        shared.clear()
        shared.update(gradient_state)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the process has this state; afterwards its own again, and what became of this one is kept."""
        before = State.now()
        self.put()
        try:
            yield
        finally:
            self.parts = State.now().parts
            before.put()


def _gpu_states() -> list[Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []


def _gradient_state() -> dict[str, Any]:
    from accelerate.state import GradientState

    return GradientState._shared_state
