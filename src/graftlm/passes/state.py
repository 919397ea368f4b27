"""The objects of one pass, and the call of a wrapper that it belongs to.

| object | lives for | written by | read by |
|---|---|---|---|
| `Run` | a call of the wrapper: a forward, a `generate` | run, model | hooks, joint, trials |
| `Call` | one forward of the base | hooks | short cuts, layouts, loss |
| `Placed`, `Packed`, `Step` | a pass | padded, seq2seq; packed; served | hooks, loss, served |
| `Targets` | a pass | loss, packed | loss, joint |
| `Pass` | from its first hook to whoever ran it | hooks | loss, joint, trials |

Layers see a `routing.Scope`, which holds none of these: what the backward pass keeps of it would keep the whole pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ..kernels import HeadForm
from ..placing import restore_order
from ..routing import Scope, Switch, current_scope, within
from .row import Row, Sequences

Memory = list[tuple[Tensor, Tensor]]  # per layer keys and values


@dataclass(frozen=True, kw_only=True)
class Form:
    """Which short cuts hold for a model.

    Args:
        head: what the model does to its head's output.
        packs: rows can be packed.
        shifts: the loss is that of the next token (a causal model's), not of the token at the same place.
    """

    head: HeadForm
    packs: bool
    shifts: bool


@dataclass(frozen=True)
class Probe:
    """A trial's pass: it takes these short cuts (None: none), and keeps what reaches and leaves the head."""

    form: Form | None


@dataclass(frozen=True, kw_only=True)
class Call:
    """One forward of the base, as it was asked for.

    Args:
        batch: rows.
        keeps_cache: its cache is for later steps; without, a prefix is put in front and nothing is kept.
        own_positions: `position_ids` are given.
        gives_tuple: outputs without names.
        smoothing: `label_smoothing`.
    """

    batch: int
    keeps_cache: bool = False
    own_positions: bool = False
    gives_tuple: bool = False
    smoothing: float = 0.0
    probe: Probe | None = None


@dataclass(frozen=True, kw_only=True)
class Placed:
    """How the tokens of padded rows were laid out.

    Args:
        order: where each place comes from [B, P + T] (see `placing.virtual_order`); None: as given.
        keys: the same of the last of all keys, for a step behind a filled cache.
        drop: virtual tokens that outputs leave out.
        memory: the prefix of each layer, where this pass puts it in front.
        positions: of each place [B, n], for a half that counts padding by itself.
        masked: virtual tokens that already stand in the encoder's mask.
    """

    order: Tensor | None = None
    keys: Tensor | None = None
    drop: int = 0
    memory: Memory | None = None
    positions: Tensor | None = None
    masked: int = 0

    @property
    def moved(self) -> bool:
        """Whether outputs have to be put back into the given order."""
        return self.order is not None or self.keys is not None

    def restore(self, states: Tensor) -> Tensor:
        """states [B, P + T, ...] in the given order, virtual tokens first (or left out)."""
        return states if self.order is None else restore_order(states, self.order)[:, self.drop :]


@dataclass(frozen=True, kw_only=True)
class Packed:
    """How all rows were laid out in one.

    Args:
        shape: of the batch, (B, T).
        found: its sequences; `row` has their places.
        most: virtual tokens in front of each row of the outputs.
    """

    shape: tuple[int, int]
    found: Sequences
    row: Row
    most: int

    def restore(self, states: Tensor) -> Tensor:
        """states [1, N, H] of the packed row as [B, P + T, H], virtual tokens first; zeros on padding."""
        (batch, length), most, packed = self.shape, self.most, states[0]
        at = self.found.kept.to(packed.device)
        real = packed.new_zeros(batch * length, packed.shape[-1]).index_copy(0, at, packed[self.row.tokens])
        real = real.view(batch, length, -1)
        if not most:
            return real
        rows = (self.found.kept[self.found.starts] // length).tolist()
        pairs = [
            (r * most + most - end + p, p)
            for r, (start, end) in zip(rows, self.row.virtual, strict=True) for p in range(start, end)
        ]  # fmt: skip
        to, origin = torch.tensor(pairs, device=packed.device).T
        front = packed.new_zeros(batch * most, packed.shape[-1]).index_copy(0, to, packed[origin])
        return torch.cat((front.view(batch, most, -1), real), dim=1)


@dataclass(frozen=True)
class Step:
    """New tokens of a server's rows, side by side in one. `last`: place of each row's last one [rows]."""

    last: Tensor

    def restore(self, states: Tensor) -> Tensor:
        """states [1, N, H] of each row's last token [rows, H]."""
        return states[0][self.last]


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What is predicted where.

    Args:
        places: that have something to predict, in the flattened layout [labelled].
        targets: what [labelled].
        items: what the summed loss is divided by, if not by their number.
        owners: the group of each, in a mixed batch [labelled].
    """

    places: Tensor
    targets: Tensor
    items: Any = None
    owners: Tensor | None = None


@dataclass(eq=False)
class Pass:
    """One forward of the base (or of its encoder) under a plan.

    Attributes:
        encodes: it is the encoder that runs.
        targets, form: of the loss that is made from `hidden`; None where the base makes its own.
        hidden: what reached the head [B, P + T, H] or [1, N, H].
        raw: what the head gave, in a trial.
        losses: one a target [labelled].
    """

    scope: Scope
    call: Call
    layout: Placed | Packed | Step
    targets: Targets | None = None
    form: Form | None = None
    encodes: bool = False
    hidden: Tensor | None = None
    raw: Tensor | None = None
    losses: Tensor | None = None
    _left: ExitStack = field(default_factory=ExitStack, repr=False)

    @property
    def takes_hidden(self) -> bool:
        """Whether what reaches the head is taken from it, for a loss or a step of ours."""
        return self.targets is not None or isinstance(self.layout, Step)

    def begin(self) -> None:
        """From here to `end` the base runs."""
        self._left.callback(_pass.reset, _pass.set(self))
        if self.scope is not current_scope():
            self._left.enter_context(within(self.scope))

    def end(self) -> None:
        self._left.close()

    def again(self) -> Pass:
        """The same for layers that run again in the backward pass. Without what was made meanwhile: graphs would hold
        themselves."""
        return Pass(self.scope, self.call, self.layout, encodes=self.encodes)


@dataclass(eq=False)
class Run:
    """One call of a wrapper, which may be many passes.

    Attributes:
        resumed: inputs of a `generate` that goes on from a filled cache, whole, until its first pass takes what is new.
        encoded: the encoder's outputs have come through this call's plan.
        laid: its only pass, where it was laid out before.
        prompt: ids that a `generate` was given [B, N], where an adapter waits for its invocation in them; `first` is how
            many places of the cache are before them.
        invoked: by adapter that waits, whether it acts on the last token of each row [B].
        ended: the pass that ended last.
    """

    smoothing: float = 0.0
    probe: Probe | None = None
    resumed: dict[str, Tensor] | None = None
    encoded: bool = False
    laid: Pass | None = None
    prompt: Tensor | None = None
    first: int | None = None
    invoked: dict[str, Tensor] | None = None
    ended: Pass | None = None

    @contextmanager
    def going(self) -> Iterator[Run]:
        """Passes of the block are of this call; what an interrupted one left behind is taken away."""
        token, outer = _run.set(self), _pass.get()
        try:
            yield self
        finally:
            while (left := _pass.get()) is not outer and left is not None:
                left.end()
            _run.reset(token)


_pass: ContextVar[Pass | None] = ContextVar("graftlm_pass", default=None)
_run: ContextVar[Run | None] = ContextVar("graftlm_run", default=None)


def current_pass(switch: Switch) -> Pass | None:
    """The pass that runs now, if it is of the wrapper with this switch."""
    found = _pass.get()
    return found if found is not None and found.scope.plan.switch is switch else None


def current_run() -> Run:
    """The call that runs now; a plain one where a base is called under a plan by other ways."""
    return _run.get() or Run()


def keep_pass(function: Callable) -> Callable:
    """Wrap an activation-checkpointing function so that the recomputation runs in the scope and the pass of the forward one.

    The recomputation happens in the backward pass, outside the wrapper's forward (on a GPU in another thread).
    """
    if getattr(function, "_keeps_pass", False):
        return function

    @wraps(function)
    def checkpointed(layer_function, *args, **kwargs):
        scope, now = current_scope(), _pass.get()
        again = None if now is None else now.again()

        def as_then(*inner, **inner_kwargs):
            token = _pass.set(again)
            try:
                with within(scope):
                    return layer_function(*inner, **inner_kwargs)
            finally:
                _pass.reset(token)

        return function(as_then, *args, **kwargs)

    checkpointed._keeps_pass = True  # type: ignore[attr-defined]
    return checkpointed
