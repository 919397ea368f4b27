"""Memory of each of several processes of a run: which of a plan's items they share out, and what exchanging takes.

`batch_size` is of one process, so activations are those of the plan. All ranks hold the same: `fully_shard` fills uneven
parts up. Under `fsdp2` a pass has the weights of up to two blocks whole (the one it is in, and the one before or behind),
and gathers one of them into a buffer of its own.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import PlanError
from ..training.sharding import BY_ZERO, IN_PARTS, base_parameters, check_adapters, check_scheme, check_strategy, stacks
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
        exchange: copies of the adapter's gradients that travel; under zero2 and zero3 this process's part of their mean.
        loading_bytes: highest while the base is loaded: every process loads all of it.
        peak_bytes: highest of the process.
        exchanged_bytes: of each process in an update: gradients, and what is gathered (blocks twice; by ZeRO new values).
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
    elsewhere = trained_elsewhere = gathered = sent = 0
    if strategy in IN_PARTS and processes > 1:
        made = skeleton(recipe, config)
        check_scheme(made.scheme, strategy)
        blocks, trained = in_blocks(made, recipe.training.shard_adapters)
        elsewhere, trained_elsewhere = (
            sum(bytes_of(p) - part(p, processes, strategy) for b in of for p in b) for of in (blocks, trained)
        )
        sizes = [sum(map(bytes_of, (*a, *b))) for a, b in zip(blocks, trained, strict=True)]
        gathered, sent = min(AT_ONCE * max(sizes), sum(sizes)), 2 * sum(sizes) * (processes - 1) // processes
    divided = processes if strategy in BY_ZERO else 1
    if divided > 1 or (sent and recipe.training.shard_adapters):
        check_adapters(skeleton(recipe, config).model, f"strategy: {strategy}" if divided > 1 else "shard_adapters")
    base, adapter = step.base - elsewhere, step.adapter - trained_elsewhere
    gradients, optimizer = step.gradients - trained_elsewhere, step.optimizer - 2 * trained_elsewhere
    if divided > 1:  # moments of a part; values of it that are updated, and whole ones beside the model's at the start
        optimizer, sent = -(-optimizer // divided) + -(-adapter // divided), sent + adapter * (divided - 1) // divided
    activations = step.kept + step.workspace + step.allocator
    exchange = gradients if processes > 1 else 0
    if divided > 1:  # ZeRO's part of the mean, as it came, flattened and scaled
        exchange = -(-3 * gradients // divided)
    # DDP's buckets stay, and these; the copy that `sharding.Exchange` sends is there when activations are gone
    always = exchange if strategy in ("ddp", *BY_ZERO) and planned.together == 1 else 0
    weights = base + adapter + optimizer
    training = weights + gradients + max(activations + gathered + always, exchange)
    peak = planned.process_bytes + max(training, weights + gathered + planned.evaluation_bytes)
    peak = max(peak, planned.loading_bytes)
    return Ranks(
        processes=processes, strategy=strategy, base=base, gathered=gathered, adapter=adapter, gradients=gradients,
        optimizer=optimizer, activations=activations, exchange=exchange, loading_bytes=planned.loading_bytes,
        peak_bytes=peak, exchanged_bytes=(step.gradients if processes > 1 else 0) + sent,
        updates=recipe.training.max_steps or -(-planned.updates // processes),
        fits=(1 if planned.device.gpu else processes) * peak <= planned.device.free_bytes,
    )  # fmt: skip


def in_blocks(made: Skeleton, adapters: bool) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """What `sharding.shard` shares out of each block: the base's parameters, and where wanted the adapter's."""
    host = made.model
    own = {id(p) for p in base_parameters(host.base)}
    blocks = [list(block.parameters()) for _, found in stacks(host.base) for block in found]
    trained: list[list[Tensor]] = [
        [p for p in block if adapters and id(p) not in own and p.requires_grad and p.dim()] for block in blocks
    ]
    return [[p for p in block if id(p) in own] for block in blocks], trained


def part(tensor: Tensor, processes: int, strategy: str) -> int:
    """Bytes of a process's part: rows, or under zero3 numbers, of which an uneven number is filled up."""
    if strategy == "zero3":
        return -(-tensor.numel() // processes) * tensor.element_size()
    return -(-tensor.shape[0] // processes) * bytes_of(tensor) // tensor.shape[0]
