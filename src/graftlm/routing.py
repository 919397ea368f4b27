"""The routing plan: which adapter each token of a forward pass belongs to.

A plan is set for the length of one forward pass (or one `generate`) by the wrapper that owns it. Layers that carry
adapters ask `active_adapters(switch)`. A base model may be wrapped more than once: a layer applies its adapters only
when the plan that runs is of its own wrapper, or when no plan runs (the base called directly, as with HF PEFT).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import unserializable_hook

from .errors import UnsupportedError
from .kernels.dropout import extra_rows


class Switch:
    """What is switched on in one wrapper: the active adapters' names, and whether adapters apply at all."""

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.enabled: bool = True
        self.waiting: set[str] = set()  # adapters that act from a token on, which calls of the wrapper alone know
        self.ran: tuple[Group, ...] | None = None  # what acted in the last pass with gradients; None: what is switched on
        self.again: tuple[int, tuple[Group, ...]] | None = None  # a backward pass; what acted in passes that it reached


BASE_NAME = "__base__"  # a row without adapters, and no adapter's name

Index = slice | Tensor | tuple[slice | Tensor, ...]
Group = tuple[str, ...]


class Routes:
    """Which adapters the rows of a mixed batch (or the tokens of a packed row) go through.

    Args:
        groups: the batch's different compositions of adapters; () is the bare base.
        of: the group of each row (of each token) [R]; or of each row's tokens [B, T].
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
        if self.of.dim() == 2:
            return self._token_parts(x)
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

    def _token_parts(self, x: Tensor) -> list[tuple[Group, Index]]:
        """The same where `of` is of each row's tokens: x [n, t, ...] with t the last of them, or [n T, H]."""
        rows, length = self.of.shape
        flat = x.dim() == 2 and x.is_floating_point()
        key = x.shape[: 1 if flat else 2], x.device
        if key not in self._found:
            count, width = (
                (x.shape[0] // length, length) if flat else (x.shape[0], x.shape[1] if x.dim() > 1 else length + 1)
            )
            if count % rows or width > length or (flat and x.shape[0] % (rows * length)):
                raise UnsupportedError(
                    f"A layer with adapters gets an input of shape {tuple(x.shape)} in a batch of {rows} rows of {length} "
                    "tokens that go through different adapters; its tokens cannot be told apart. Run one adapter a batch, "
                    "without alora_invocation_tokens."
                )
            of = self.of.repeat_interleave(count // rows, 0)[:, length - width :]
            of = of.flatten() if flat else of
            chosen = [(group, of == i) for i, group in enumerate(self.groups)]
            self._found[key] = [
                (g, slice(None) if bool(m.all()) else tuple(places.to(x.device) for places in m.nonzero(as_tuple=True)))
                for g, m in chosen
            ]
        return self._found[key]

    def over(self, of: Tensor, packed: bool = True) -> Routes:
        """The same for the tokens of a packed row (or for other rows), given the group of each. What layers keep of it is
        shared."""
        made = Routes(self.groups, of, packed, self.switches, self.draws)
        made._kept = self._kept
        return made

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
class Plan:
    """Who goes through what, for one call, one whole `generate` or one serving step: a wrapper's switch and the adapters
    that every token goes through. In a mixed batch `routes` says who goes through which, and `adapters` names all that take
    part. `tasks`: of each of the groups, where rows have one (see `current_task`); () where none has.
    """

    switch: Switch
    adapters: tuple[str, ...]
    routes: Routes | None = None
    tasks: tuple[int | None, ...] = ()

    @property
    def groups(self) -> list[Group]:
        """The compositions of adapters that take part."""
        return [self.adapters] if self.routes is None else self.routes.groups

    @property
    def by_row(self) -> list[Group]:
        """The composition of each row of a mixed batch, or the one of all."""
        return [self.adapters] if self.routes is None else [self.routes.groups[i] for i in self.routes.of.tolist()]

    @property
    def tasks_by_row(self) -> list[int | None]:
        """The task of each row of a mixed batch, or the one of all."""
        tasks = self.tasks or (None,) * len(self.groups)
        return list(tasks) if self.routes is None else [tasks[i] for i in self.routes.of.tolist()]


class Attention(Protocol):
    """What attends instead of a base's own attention: over a packed row's sequences, or over a server's cache."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float, p: float = 0.0) -> Tensor:
        """q [H, N, D], k and v [G, N, D] of one row's N tokens -> [N, H, D]. `p`: dropout of the probabilities."""

    def installed(self) -> AbstractContextManager:
        """The surroundings in which a base's layers come here."""


class StepAttention(Attention, Protocol):
    """What attends in a server's step."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float, p: float = 0.0, both: Tensor | None = None
    ) -> Tensor:
        """As above; `both`: keys and values, where they lie side by side [N, 2 G, D]."""


@dataclass(frozen=True)
class Scope:
    """What layers see while they run, or run again in the backward pass.

    Args:
        routes: the plan's in the layout of this pass: of rows, or of a packed row's tokens.
        attention: what attends instead of the base's own; None for that.
    """

    plan: Plan
    routes: Routes | None = None
    attention: Attention | None = None


_scope: ContextVar[Scope | None] = ContextVar("graftlm_scope", default=None)


def current_scope() -> Scope | None:
    """What layers that run now are to see, or None where no plan runs."""
    return _scope.get()


def current_plan() -> Plan | None:
    """The plan that runs now, or None."""
    scope = _scope.get()
    return None if scope is None else scope.plan


@contextmanager
def within(scope: Scope | None) -> Iterator[Scope | None]:
    """Run the block's layers in `scope`."""
    token = _scope.set(scope)
    try:
        with nullcontext() if scope is None or scope.attention is None else scope.attention.installed():
            yield scope
    finally:
        _scope.reset(token)


_task: ContextVar[int | None] = ContextVar("graftlm_task", default=None)


def current_task() -> int | None:
    """The task of the rows whose virtual tokens are asked for; None where they have none."""
    return _task.get()


@contextmanager
def asking_for(task: int | None) -> Iterator[None]:
    """Within the block adapters answer for rows of a task."""
    token = _task.set(task)
    try:
        yield
    finally:
        _task.reset(token)


@contextmanager
def running(plan: Plan | None) -> Iterator[Plan | None]:
    """Run the block under `plan`."""
    token = _scope.set(None if plan is None else Scope(plan, plan.routes))
    try:
        yield plan
    finally:
        _scope.reset(token)


def active_adapters(switch: Switch) -> tuple[str, ...]:
    """Names of the adapters that a layer of the wrapper `switch` belongs to applies now."""
    if _scope.get() is None:
        active = switch.active if switch.enabled else ()
        active = tuple(n for n in active if n not in switch.waiting) if switch.waiting else active
        ran = switch.ran
        if switch.again is not None and switch.again[0] == torch._C._current_graph_task_id():
            ran = switch.again[1]
        if ran is not None and ran != (active,):
            _refuse_again(ran, active)
        return active
    return planned_adapters(switch)


def remember(switch: Switch) -> None:
    """Note what acts in the pass that runs now, for layers that run once more in its backward pass."""
    routes = active_routes(switch)
    switch.ran = (planned_adapters(switch),) if routes is None else tuple(dict.fromkeys(routes.groups))


def watch(switches: Iterable[Switch], output: Any) -> None:
    """Let a backward pass that reaches a pass's outputs note what acted in it: of several passes that wait for theirs, the
    last is not the one whose layers run once more."""
    acted = [(switch, switch.ran) for switch in switches if switch.ran is not None]
    if not acted or torch.compiler.is_compiling():
        return

    @unserializable_hook
    def reached(grad: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        for switch, groups in acted:
            before = switch.again[1] if switch.again is not None and switch.again[0] == task else ()
            switch.again = task, tuple(dict.fromkeys(before + groups))

    for tensor in _tensors(output):
        if tensor.grad_fn is not None:
            tensor.register_hook(reached)


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors that a model's output holds; logits that are made when they are read stay unread."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (dict, list, tuple)):
        for part in dict.values(output) if isinstance(output, dict) else output:
            yield from _tensors(part)


def _refuse_again(ran: tuple[Group, ...], active: Group) -> None:
    """UnsupportedError in a backward pass: a model that calls `torch.utils.checkpoint` itself runs its layers again outside
    of the plan, by what is switched on; where that is something else than in the pass, the gradients would be others."""
    if torch._C._current_graph_task_id() == -1:  # no backward pass
        return
    then, now = (", ".join("+".join(group) or "none" for group in groups) for groups in (ran, (active,)))
    raise UnsupportedError(
        "A layer runs again in the backward pass (the model's own activation checkpointing) with other adapters than in its "
        f"forward pass: {then} then, {now} now. Keep the same adapters active until backward() is through; for batches of "
        "different adapters, or several wrappers of one base, switch that checkpointing off."
    )


def planned_adapters(switch: Switch) -> Group:
    """The same where a plan runs; none where none does."""
    scope = _scope.get()
    if scope is not None and scope.routes is not None and scope.routes.switches is not None:
        own = scope.routes.of_switch(switch)
        return tuple(dict.fromkeys(n for group in own.groups for n in group)) if own is not None else ()
    return scope.plan.adapters if scope is not None and scope.plan.switch is switch else ()


def active_routes(switch: Switch) -> Routes | None:
    """The routes of the mixed batch that runs now, for a layer of the wrapper `switch` belongs to; None for none."""
    scope = _scope.get()
    if scope is None or scope.routes is None or not (scope.plan.switch is switch or scope.routes.switches):
        return None
    return scope.routes.of_switch(switch)


def together() -> bool:
    """Whether adapters of several wrappers run in one pass now."""
    scope = _scope.get()
    return scope is not None and scope.routes is not None and scope.routes.switches is not None


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
