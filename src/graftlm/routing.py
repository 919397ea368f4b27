"""The routing plan: which adapter each token of a forward pass belongs to, and where virtual tokens stand.

Shapes: B rows, T tokens a row as given, P virtual tokens, H hidden size.

A plan is set for the length of one forward pass (or one `generate`) by the wrapper that owns it. Layers that carry
adapters ask `active_adapters(switch)`. A base model may be wrapped more than once: a layer applies its adapters only
when the plan that runs is of its own wrapper, or when no plan runs (the base called directly, as with HF PEFT).

Virtual tokens stand next to the real tokens, after left padding, so that a padded row equals the row alone. In a batch
whose rows belong to different adapters, rows with fewer of them are filled with padding on the left::

    given       pad pad  x0  x1  x2         x0  x1  x2 pad pad
    with P=2    pad pad  v0  v1  x0 x1 x2   v0  v1  x0  x1  x2 pad pad
    P=1 of 2    pad pad pad  v0  x0 x1 x2   pad v0  x0  x1  x2 pad pad
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UnsupportedError
from .kernels.dropout import extra_rows


class Switch:
    """What is switched on in one wrapper: the active adapters' names, and whether adapters apply at all."""

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.enabled: bool = True


BASE_NAME = "__base__"  # a row without adapters, and no adapter's name

Index = slice | Tensor | tuple[slice, slice | Tensor]
Group = tuple[str, ...]


class Routes:
    """Which adapters the rows of a mixed batch (or the tokens of a packed row) go through.

    Args:
        groups: the batch's different compositions of adapters; () is the bare base.
        of: the group of each row (of each token) [R].
        packed: whether it is of tokens, in a packed row.
        switches: of each group's wrapper, where adapters of several over one base run together; None: the plan's.
        draws: what random numbers of each group come from (see `Draws`); None: torch's generator, for all.
    """

    def __init__(
        self, groups: list[Group], of: Tensor, packed: bool = False, switches: list[Switch] | None = None,
        draws: list[Draws] | None = None,
    ) -> None:  # fmt: skip
        self.groups = groups
        self.of = of
        self.packed = packed
        self.switches = switches
        self.draws = draws
        self._own: dict[int, Routes | None] = {}
        self._kept: dict[int, dict] = {}
        self._found: dict[Any, list[tuple[Group, Index]]] = {}

    @classmethod
    def by_row(cls, rows: list[Group]) -> Routes:
        """The routes of a batch whose rows go through `rows`."""
        groups = list(dict.fromkeys(rows))
        return cls(groups, torch.tensor([groups.index(row) for row in rows]))

    def parts(self, x: Tensor) -> list[tuple[Group, Index]]:
        """Every group with the index of its part of `x`, for `x[index]`.

        x [n, ...] with n a multiple of R: rows, rows times beams, or rows times tokens in one axis (each row's side by
        side); of a packed row [R, ...] or [1, R, ...].

        Raises:
            UnsupportedError: another shape, in which rows cannot be told apart.
        """
        second = self.packed and x.dim() > 1 and x.shape[0] == 1
        count = x.shape[1] if second else x.shape[0]
        key = second, count, x.device
        if key not in self._found:
            if count % len(self.of) or (self.packed and count > len(self.of)):
                raise UnsupportedError(
                    f"A layer with adapters gets an input of shape {tuple(x.shape)} in a batch of {len(self.of)} rows of "
                    "different adapters; its rows cannot be told apart. Run one adapter a batch on this model."
                )
            of = self.of.repeat_interleave(count // len(self.of))
            found = [(group, _places(of == i, x.device)) for i, group in enumerate(self.groups)]
            self._found[key] = [(g, (slice(None), at) if second else at) for g, at in found]
        return self._found[key]

    def over(self, of: Tensor) -> Routes:
        """The same for the tokens of a packed row, given the group of each."""
        return Routes(self.groups, of, True, self.switches, self.draws)

    def of_switch(self, switch: Switch) -> Routes | None:
        """What of it concerns one of several wrappers: other wrappers' groups are the bare base to it. None for nothing."""
        if self.switches is None:
            return self
        key = id(switch)
        if key not in self._own:
            groups = [g if own is switch else () for own, g in zip(self.switches, self.groups, strict=True)]
            self._own[key] = Routes(groups, self.of, self.packed, None, self.draws) if any(groups) else None
        return self._own[key]

    def kept_for(self, layer: Any) -> dict:
        """What a layer keeps from pass to pass while this plan lasts (one forward, or one whole `generate`)."""
        return self._kept.setdefault(id(layer), {})

    def drawing(self, group: int) -> AbstractContextManager:
        """The surroundings in which a group's random numbers are drawn."""
        return nullcontext() if self.draws is None else self.draws[group].running()

    def each(self, count: int, device: torch.device) -> Tensor:
        """The group of each of `count` rows (a multiple of R: beams)."""
        return self.of.repeat_interleave(count // len(self.of)).to(device)


class Draws:
    """A stream of random numbers of its own: within `running()` torch's CPU generator goes on from `state`.

    Args:
        state: of `torch.get_rng_state()`.
    """

    def __init__(self, state: Tensor) -> None:
        self.state = state
        self.extra = 0  # rows of filling that the stream's owner would draw for as well, if it ran alone

    @contextmanager
    def running(self) -> Iterator[None]:
        before, rows = torch.get_rng_state(), extra_rows.set(self.extra)
        torch.set_rng_state(self.state)
        try:
            yield
        finally:
            extra_rows.reset(rows)
            self.state = torch.get_rng_state()
            torch.set_rng_state(before)


def _places(chosen: Tensor, device: torch.device) -> slice | Tensor:
    """Where `chosen` [n] is True: a slice where the places lie side by side."""
    places = chosen.nonzero()[:, 0]
    first, last = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)
    return slice(first, last) if last - first == len(places) else places.to(device)


@dataclass(frozen=True)
class Front:
    """How many entries (virtual tokens, or a prefix's) stand in front of each row: `most`, and `each` [B, 1] where rows
    differ (else the same number)."""

    most: int
    each: int | Tensor

    @classmethod
    def of(cls, counts: list[int], each: Tensor | None) -> Front:
        """Of groups with these counts; `each` [B] is the group of each row, None where there is only one."""
        if each is None or len(set(counts)) == 1:
            return cls(counts[0], counts[0])
        return cls(max(counts), torch.tensor(counts, device=each.device)[each][:, None])

    def __bool__(self) -> bool:
        return self.most > 0

    @property
    def even(self) -> bool:
        return isinstance(self.each, int)

    def ones(self, mask: Tensor) -> Tensor:
        """The entries' part of an attention mask [B, T]: [B, most], ones on the right, zeros where a row has fewer."""
        places = torch.arange(self.most, device=mask.device)
        return (places >= self.most - self.each).to(mask.dtype).expand(mask.shape[0], -1)


@dataclass
class Plan:
    """One forward pass: its wrapper's switch and the adapters that every token goes through.

    In a mixed batch `routes` says who goes through what, and `adapters` names all that take part. `scratch` holds what
    the entry points of this pass need to tell each other (for example the encoder's positions).

    In a training pass `segments` says how a packed row divides into sequences, and `around` makes the surroundings in
    which the base's layers run (again). `way`, `form` and `form_check` are the engine's while it tries out its short
    cuts. `smoothing` is the call's `label_smoothing`. `resumed` has the inputs of a `generate`
    that goes on from a filled cache, whole, until its first pass takes what is new of them; `encoded` says that the
    encoder's outputs have come through this plan.
    """

    switch: Switch
    adapters: tuple[str, ...]
    scratch: dict = field(default_factory=dict)
    segments: Any = None
    around: Callable[[Plan], AbstractContextManager] = nullcontext  # of this plan, which it must not hold
    way: str | None = None
    form: Any = None
    form_check: bool = False
    smoothing: float = 0.0
    routes: Routes | None = None
    resumed: dict[str, Tensor] | None = None
    encoded: bool = False

    @property
    def groups(self) -> list[Group]:
        """The compositions of adapters that take part."""
        return [self.adapters] if self.routes is None else self.routes.groups

    @property
    def by_row(self) -> list[Group]:
        """The composition of each row of a mixed batch, or the one of all."""
        return [self.adapters] if self.routes is None else [self.routes.groups[i] for i in self.routes.of.tolist()]


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
    return planned_adapters(switch)


def planned_adapters(switch: Switch) -> Group:
    """The same where a plan runs; none where none does."""
    plan = _running.get()
    if plan is not None and plan.routes is not None and plan.routes.switches is not None:
        own = plan.routes.of_switch(switch)
        return tuple(dict.fromkeys(n for group in own.groups for n in group)) if own is not None else ()
    return plan.adapters if plan is not None and plan.switch is switch else ()


def active_routes(switch: Switch) -> Routes | None:
    """The routes of the mixed batch that runs now, for a layer of the wrapper `switch` belongs to; None for none."""
    plan = _running.get()
    if plan is None or plan.routes is None or not (plan.switch is switch or plan.routes.switches):
        return None
    return plan.routes.of_switch(switch)


def by_group(routes: Routes, result: Tensor, change: Callable[[Group, Index], Tensor | None]) -> Tensor:
    """`result` with each group's part replaced by `change(group, index)`; None leaves a part as it is."""
    made = None
    for i, (group, index) in enumerate(routes.parts(result)):
        with routes.drawing(i):
            part = change(group, index)
        if part is not None:
            made = result.clone() if made is None else made
            made[index] = part
    return result if made is None else made


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
            with running(plan), plan.around(plan) if plan is not None else nullcontext():
                return layer_function(*inner, **inner_kwargs)

        return function(under_plan, *args, **kwargs)

    checkpointed._keeps_plan = True  # type: ignore[attr-defined]
    return checkpointed


def positions_from_mask(mask: Tensor) -> Tensor:
    """Position ids [B, T] of a 2D attention mask [B, T]: 0 for the first attended token of each row, padding clamped."""
    return (mask.long().cumsum(-1) - 1).clamp_min_(0)


def virtual_order(mask: Tensor, front: Front, to_left: bool = False) -> Tensor:
    """Where each place of a row with virtual tokens comes from.

    mask [B, T] of ones and zeros; P = `front.most`. Returns [B, P + T]: an index below P is that virtual token, an index
    `P + t` is given token t. A row with fewer virtual tokens has the last of the P; the others stand at its left end.
    With `to_left` right padding is moved to the left (for heads that read the last place).
    """
    batch, length = mask.shape
    count, missing = front.most, front.most - front.each
    real = mask.bool()
    places = torch.arange(length, device=mask.device).expand(batch, length)
    if to_left:  # padding first, then the real tokens in their order
        places = torch.argsort(torch.where(real, places + length, places), dim=-1)
        first = length - real.sum(-1, keepdim=True)
    else:
        first = torch.where(real, places, length).amin(-1, keepdim=True) % length
    slot = torch.arange(count + length, device=mask.device).expand(batch, -1)
    start = first + missing  # of the virtual tokens
    given = torch.where(slot < start, slot - missing, slot - count).clamp_min_(0)
    virtual = (slot >= start) & (slot < first + count)
    placed = torch.where(virtual, slot - first, count + places.gather(1, given))
    return placed if front.even else torch.where(slot < missing, slot, placed)


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


def chained(first: Tensor, then: Tensor, count: int) -> Tensor:
    """The order [B, P + T] that puts P virtual tokens among tokens which were in the order `first` [B, T] before."""
    virtual = torch.arange(count, device=first.device).expand(len(first), -1)
    return torch.cat((virtual, first + count), dim=1).gather(1, then)


def restore_attention(weights: Tensor, queries: Tensor | None, keys: Tensor) -> Tensor:
    """Attention weights [B, heads, Q, K] with both axes in the given order, virtual tokens first (behind a prefix).

    `keys` [B, n] is the order of the last n of all keys. Layers with a sliding window have the last ones only: the others'
    weights are zero.
    """
    missing = keys.shape[1] - weights.shape[-1]
    if weights.dim() != 4 or (missing > 0 and queries is not None):
        raise UnsupportedError(
            f"output_attentions with virtual tokens: weights of shape {tuple(weights.shape)} cannot be put in the order of "
            f"the {keys.shape[1]} places (this model's attention is local). Leave output_attentions out."
        )
    weights = F.pad(weights, (max(missing, 0), 0))
    if queries is not None and weights.shape[2] == queries.shape[1]:
        weights = restore_order(weights.transpose(1, 2), queries).transpose(1, 2)
    front = weights.shape[-1] - keys.shape[1]
    restored = restore_order(weights[..., front:].permute(0, 3, 1, 2), keys).permute(0, 2, 3, 1)
    return torch.cat((weights[..., :front], restored), dim=-1)
