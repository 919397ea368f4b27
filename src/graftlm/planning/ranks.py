"""Memory of each of several processes of a run: which of a plan's items they share out, and what exchanging takes.

`batch_size` is of one process, so activations are those of the plan. All ranks hold the same: `fully_shard` fills uneven
parts up. Under `fsdp2` a pass has the weights of up to two blocks whole (the one it is in, and the one before or behind),
and gathers one of them into a buffer of its own.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..errors import PlanError
from ..training.sharding import base_parameters, check_scheme, check_strategy, stacks
from .sizes import bytes_of
from .skeleton import Skeleton, skeleton
from .whole import Plan

AT_ONCE = 3  # blocks' weights whole at one time: two, and what one is gathered into


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Bytes of one process of a run in `processes`; all have the same.

    Attributes:
        base: what it holds of the base; `gathered`: blocks' weights of others while a pass is in them.
        adapter, gradients, optimizer, activations: as in one process, or its part of them.
        exchange: copies of the adapter's gradients that travel.
        loading_bytes: highest while the base is loaded: every process loads all of it.
        peak_bytes: highest of the process.
        exchanged_bytes: of each process in an update: gradients, and under fsdp2 what it gathers (forward, backward).
        updates: of the run.
        fits: each on a GPU of its own, or all side by side in this machine's memory.
    """

    processes: int
    strategy: str
    base: int
    gathered: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    exchange: int
    loading_bytes: int
    peak_bytes: int
    exchanged_bytes: int
    updates: int
    fits: bool

    def to_dict(self) -> dict[str, Any]:
        """Everything in numbers, for JSON."""
        return dataclasses.asdict(self)


def ranks(planned: Plan, processes: int, config: Any = None) -> Ranks:
    """The memory of each process where a planned run is made by several.

    Raises:
        PlanError: fewer than one process, or more of them than rows.
        UnsupportedError: a strategy that cannot hold the run.
    """
    if processes < 1:
        raise PlanError(f"--processes {processes}: expected at least 1, the number of processes that train together")
    if processes > planned.rows["rows"]:
        raise PlanError(f"{processes} processes for {planned.rows['rows']} rows to train on: each needs one; plan fewer")
    recipe, step = planned.recipe, planned.step
    strategy = recipe.training.strategy
    check_strategy(strategy, False, planned.together > 1, processes)
    held, gathered, sent = step.base, 0, 0
    if strategy == "fsdp2" and processes > 1:
        made = skeleton(recipe, config)
        check_scheme(made.scheme)
        held, gathered, sent = shares(made, step.base, processes)
    weights = held + step.adapter + step.gradients + step.optimizer
    activations = step.kept + step.workspace + step.allocator
    exchange = step.gradients if processes > 1 else 0
    # DDP's buckets stay; the copy that `sharding.Exchange` sends is there when activations are gone
    always = exchange if strategy == "ddp" and planned.together == 1 else 0
    training = weights + max(activations + gathered + always, exchange)
    evaluating = weights - step.gradients + gathered + planned.evaluation_bytes
    peak = max(planned.process_bytes + max(training, evaluating), planned.loading_bytes)
    return Ranks(
        processes=processes, strategy=strategy, base=held, gathered=gathered, adapter=step.adapter,
        gradients=step.gradients, optimizer=step.optimizer, activations=activations, exchange=exchange,
        loading_bytes=planned.loading_bytes, exchanged_bytes=exchange + sent,
        updates=recipe.training.max_steps or -(-planned.updates // processes),
        peak_bytes=peak, fits=(1 if planned.device.gpu else processes) * peak <= planned.device.free_bytes,
    )  # fmt: skip


def shares(made: Skeleton, base: int, processes: int) -> tuple[int, int, int]:
    """Under fsdp2, bytes of a base that a process holds, of the blocks that are whole at one time, and that it gets in a
    pass (forward and backward)."""
    host = made.model
    own = {id(p) for p in base_parameters(host.base)}
    blocks = [[p for p in block.parameters() if id(p) in own] for _, found in stacks(host.base) for block in found]
    whole = sum(bytes_of(p) for block in blocks for p in block)
    part = sum(-(-p.shape[0] // processes) * bytes_of(p) // p.shape[0] for block in blocks for p in block)
    largest = max((sum(map(bytes_of, block)) for block in blocks), default=0)
    return base - whole + part, min(AT_ONCE * largest, whole), 2 * whole * (processes - 1) // processes
