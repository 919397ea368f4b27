"""Which of several ways to compute something is the fastest here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_HOPELESS = 3.0  # times the fastest's time, from which on a way is not tried again


def time_ratio(first: Callable[[], Any], second: Callable[[], Any], like: Tensor, times: int = 5) -> float:
    """The time of `first` over that of `second`: see `shortest_times`."""
    one, other = shortest_times([first, second], like, times)
    return one / other


def fastest(calls: Sequence[Callable[[], Any]], like: Tensor, clear: float) -> int:
    """Which call is the fastest; the first one, unless another takes less than `clear` of its time."""
    for call in calls:  # what is made at a first call and kept
        call()
    times = shortest_times(calls, like)
    best = min(range(len(calls)), key=times.__getitem__)
    return best if times[best] < clear * times[0] else 0


def shortest_times(calls: Sequence[Callable[[], Any]], like: Tensor, times: int = 5) -> list[float]:
    """The shortest run of each in seconds, since what disturbs a run only makes it longer.

    They run in turn, `times` times (once, where one is slower by far), each until the device of `like` has done its work.
    """
    best = [float("inf")] * len(calls)
    for _ in range(times):
        limit = _HOPELESS * min(best)
        for i, call in enumerate(calls):
            if best[i] > limit and best[i] != float("inf"):
                continue
            wait(like)
            start = time.perf_counter()
            call()
            wait(like)
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def wait(like: Tensor) -> None:
    """Until the tensor's device has done what it was given."""
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
