"""The routing plan: which adapter each token of a forward pass belongs to, and where virtual tokens stand.

Shapes: B rows, T tokens a row as given, P virtual tokens, H hidden size.

A plan is set for the length of one forward pass (or one `generate`) by the wrapper that owns it. Layers that carry
adapters ask `active_adapters(switch)`. A base model may be wrapped more than once: a layer applies its adapters only
when the plan that runs is of its own wrapper, or when no plan runs (the base called directly, as with HF PEFT).

Virtual tokens stand next to the real tokens, after left padding, so that a padded row equals the row alone::

    given       pad pad  x0  x1  x2         x0  x1  x2 pad pad
    with P=2    pad pad  v0  v1  x0 x1 x2   v0  v1  x0  x1  x2 pad pad
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor


class Switch:
    """What is switched on in one wrapper: the active adapters' names, and whether adapters apply at all."""

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.enabled: bool = True


@dataclass
class Plan:
    """One forward pass: its wrapper's switch and the adapters that every token goes through.

    `scratch` holds what the entry points of this pass need to tell each other (for example the encoder's positions).

    In a training pass `segments` says how a packed row divides into sequences, and `around` makes the surroundings in which
    the base's layers run (again). `way`, `form` and `form_check` are the engine's while it tries out its short cuts.
    """

    switch: Switch
    adapters: tuple[str, ...]
    scratch: dict = field(default_factory=dict)
    segments: Any = None
    around: Callable[[], AbstractContextManager] = nullcontext
    way: str | None = None
    form: Any = None
    form_check: bool = False


_running: ContextVar[Plan | None] = ContextVar("graftlm_plan", default=None)


def current_plan() -> Plan | None:
    """The plan of the forward pass that runs now, or None."""
    return _running.get()


@contextmanager
def running(plan: Plan | None) -> Iterator[Plan | None]:
    """Run the block under `plan`."""
    token = _running.set(plan)
    try:
        yield plan
    finally:
        _running.reset(token)


def active_adapters(switch: Switch) -> tuple[str, ...]:
    """Names of the adapters that a layer of the wrapper `switch` belongs to applies now."""
    plan = _running.get()
    if plan is None:
        return switch.active if switch.enabled else ()
    return plan.adapters if plan.switch is switch else ()


def keep_plan(function: Callable) -> Callable:
    """Wrap an activation-checkpointing function so that the recomputation runs under the plan of the forward pass.

    The recomputation happens in the backward pass, outside the wrapper's forward (on a GPU in another thread).
    """
    if getattr(function, "_keeps_plan", False):
        return function

    @wraps(function)
    def checkpointed(layer_function, *args, **kwargs):
        plan = _running.get()

        def under_plan(*inner, **inner_kwargs):
            with running(plan), plan.around() if plan is not None else nullcontext():
                return layer_function(*inner, **inner_kwargs)

        return function(under_plan, *args, **kwargs)

    checkpointed._keeps_plan = True  # type: ignore[attr-defined]
    return checkpointed


def positions_from_mask(mask: Tensor) -> Tensor:
    """Position ids [B, T] of a 2D attention mask [B, T]: 0 for the first attended token of each row, padding clamped."""
    return (mask.long().cumsum(-1) - 1).clamp_min_(0)


def virtual_order(mask: Tensor, count: int, to_left: bool = False) -> Tensor:
    """Where each place of a row with `count` virtual tokens comes from.

    mask [B, T] of ones and zeros. Returns [B, count + T]: an index below `count` is that virtual token, an index
    `count + t` is given token t. With `to_left` right padding is moved to the left (for heads that read the last place).
    """
    batch, length = mask.shape
    real = mask.bool()
    places = torch.arange(length, device=mask.device).expand(batch, length)
    if to_left:  # padding first, then the real tokens in their order
        places = torch.argsort(torch.where(real, places + length, places), dim=-1)
        first = length - real.sum(-1, keepdim=True)
    else:
        first = torch.where(real, places, length).amin(-1, keepdim=True) % length
    slot = torch.arange(count + length, device=mask.device).expand(batch, -1)
    given = torch.where(slot < first, slot, slot - count).clamp_min_(0)
    virtual = (slot >= first) & (slot < first + count)
    return torch.where(virtual, slot - first, count + places.gather(1, given))


def real_first(mask: Tensor) -> Tensor:
    """Order [B, T] that puts each row's real tokens first and its padding last."""
    places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    return torch.argsort(torch.where(mask.bool(), places, places + mask.shape[1]), dim=-1)


def reorder(given: Tensor, order: Tensor) -> Tensor:
    """given [B, T, ...] in the order [B, T] of its token axis."""
    index = order.view(*order.shape, *(1,) * (given.dim() - 2)).expand(-1, -1, *given.shape[2:])
    return given.gather(1, index)


def place_virtual(virtual: Tensor, given: Tensor, order: Tensor) -> Tensor:
    """Put virtual tokens among the given ones.

    virtual [B, P, ...], given [B, T, ...], order [B, P + T] from `virtual_order`; returns [B, P + T, ...].
    """
    return reorder(torch.cat((virtual.to(given.dtype), given), dim=1), order)


def restore_order(placed: Tensor, order: Tensor) -> Tensor:
    """Undo `place_virtual`: [B, P + T, ...] back to the P virtual tokens first, then the T tokens as they were given."""
    return reorder(placed, torch.argsort(order, dim=-1))
