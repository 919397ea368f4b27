"""Which of two ways to compute something is the faster here."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def time_ratio(first: Callable[[], Any], second: Callable[[], Any], like: Tensor, times: int = 5) -> float:
    """The time of `first` over that of `second`: the shortest run of each, since what disturbs a run only makes it longer.

    They run in turn, `times` times, each until the device of `like` has done its work.
    """
    best = {first: float("inf"), second: float("inf")}
    for call in (first, second) * times:
        wait(like)
        start = time.perf_counter()
        call()
        wait(like)
        best[call] = min(best[call], time.perf_counter() - start)
    return best[first] / best[second]


def wait(like: Tensor) -> None:
    """Until the tensor's device has done what it was given."""
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
