"""What adapters do in a lean step (see `architectures.lean`) beside each of its products, for rows of several compositions.

Low-rank updates of a composition are joined over the layers of a product: A [in, L r], and B [L, r, out / L] where its L
layers have one width, else one of L = 1 with zeros where a layer's rank meets another layer's columns. Those of all
compositions of a step lie in one `stack.Stack`, a slot each:

    tokens    x0 (slot 1)  x1 (slot 0)  x2 (slot 1)  x3 (base)
    by slot   [[x1, .], [x0, x2]]  [S, m, in] ─A→ [S, m, L r] ─B→ [S, m, out]  added to x1, x0, x2

A composition of many tokens goes through its slot by itself. Other changes and bottlenecks go by their own functions,
composition by composition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..architectures.gated import plain
from ..architectures.lean import Acts, Lean
from ..layers.adapted import Adapted
from ..layers.change import Change, Held
from ..layers.frozen import Frozen
from ..methods.bottleneck import Adapter as Bottleneck
from ..methods.bottleneck import OutputHook
from ..routing import Group, Index
from .slots import ByFactors, grouped, placed, update
from .stack import Low, Place, Shape, Stack

if TYPE_CHECKING:
    from ..adapters import AdapterSet

FEW = 8  # tokens of a composition that go with those of others


@dataclass(frozen=True)
class Other:
    """What of a composition is no low-rank update: changes of one layer, whose columns of the joint output these are."""

    layer: Adapted
    columns: slice
    parts: list[tuple[Change, Held]]

    def apply(self, index: Index, y: Tensor, x: Tensor) -> None:
        """Change y [N, out], in place, where `index` says; x [N, in]."""
        columns = y[:, self.columns]
        came = x[index]
        first, *inputs = self.layer._enter(self.parts, came)
        part = columns[index] if first is came else self.layer.base_layer(first)
        columns[index] = self.layer._leave(self.parts, inputs, part, [], True)


class Acting:
    """One composition in a lean form.

    Attributes:
        lows: its low-rank updates, by place.
        shapes: of these, by place.
        others: other changes, by place.
        tails: bottlenecks behind a product, by place.
        in_modules: whether something of it is in modules that a step calls as they stand.
        whole: whether that is all that the composition does.
    """

    def __init__(self, host: AdapterSet, form: Lean, group: Group) -> None:
        self.lows: dict[Place, Low] = {}
        self.shapes: dict[Place, Shape] = {}
        self.others: dict[Place, list[Other]] = {}
        self.tails: dict[Place, Tail] = {}
        soft = [host.prompt_encoder[n] for n in group if any(host.counts((n,)))]  # in the cache, in front of rows
        norms = [norm.module for layer in form.layers for norm in layer.norms]  # with adapters, modules are called
        found = {id(p) for module in (*form.called, *norms) for p in module.parameters()}
        self.in_modules = any(id(p) in found for n in group for _, p in host.adapter_parameters(n))
        found |= {id(p) for module in soft for p in module.parameters()}
        for number, layer in enumerate(form.layers):
            for name, site in layer.sites.items():
                found |= self._read(host, group, (number, name), site)
        self.whole = all(id(p) in found for n in group for _, p in host.adapter_parameters(n))

    def _read(self, host: AdapterSet, group: Group, place: Place, site: Any) -> set[int]:
        """What the composition does at a product; the ids of its parameters there."""
        found: set[int] = set()
        lows: Low = []
        for layer, (module, columns) in enumerate(zip(site.modules, site.columns, strict=True)):
            adapted = next((m for m in _around(module) if m.switch is host.switch), None)
            parts = [] if adapted is None else [(adapted.changes[n], adapted.held(n)) for n in group if n in adapted.changes]
            found |= {id(p) for _, t in parts for _, p in adapted.parts(t.name)}  # type: ignore[union-attr]
            own = [change.low_rank(t) for change, t in parts]
            if all(low is not None and not low.p for low in own):
                lows += [(layer, low) for low in own if low is not None]
            else:
                self.others.setdefault(place, []).append(Other(adapted, columns, parts))  # type: ignore[arg-type]
            for hook in module._forward_hooks.values():
                if isinstance(hook, OutputHook) and hook.host is host:
                    names = [n for n in group if n in hook.adapters and hook.adapters[n][1] is None]
                    found |= {id(p) for n in names for p in hook.adapters[n][0].parameters()}
                    if names:
                        self.tails[place] = Tail(hook, names)
        if lows:
            self.lows[place] = lows
            ranks = tuple(sum(len(low.a) for own, low in lows if own == layer) for layer in range(len(site.columns)))
            self.shapes[place] = Shape(lows[0][1].a.shape[1], ranks, tuple(site.columns))
        return found


def _around(module: Any) -> list[Adapted]:
    """The modules with adapters around a layer, the outermost first."""
    found = []
    while isinstance(module, Adapted):
        found.append(module)
        module = module.base_layer
    return found


def frozen_in(form: Lean) -> list[Frozen] | None:
    """The layers of a form that adapters stand around; None where something else stands around one."""
    found = []
    for layer in form.layers:
        for site in layer.sites.values():
            for module, inner in zip(site.modules, site.layers, strict=True):
                around = _around(module)
                if (around[-1].base_layer if around else module) is not inner:
                    return None
                found += [m.frozen for m in around]
    return found


class Tail:
    """Bottlenecks behind a product.

    Attributes:
        known: they are such as `apply` does by itself; else they are called.
    """

    def __init__(self, hook: OutputHook, names: list[str]) -> None:
        self.hook = hook
        self.names = names
        self.adapters: list[Any] = [hook.adapters[name][0] for name in names]
        self.known = all(
            type(m) is Bottleneck
            and all(plain(type(part)) is nn.Linear and not part._forward_hooks for part in (m.down, m.up))
            for m in self.adapters
        )
        adapters = self.adapters if self.known else []
        self.parts = [(m.down.weight, m.down.bias, m.activation, m.up.weight, m.up.bias, m.scaling) for m in adapters]

    def apply(self, index: Index, y: Tensor, x: Tensor) -> None:
        """Change y [N, out], in place, where `index` says."""
        rows = y[index]
        if not self.known:
            y[index] = self.hook.added(self.names, rows, {})
            return
        for down, bias, activation, up, shift, scaling in self.parts:
            inner = activation(F.linear(rows.to(down.dtype), down, bias))
            rows.add_(F.linear(inner, up, shift).to(rows.dtype), alpha=scaling)
        if not isinstance(index, slice):
            y[index] = rows


class RowsBeside(dict[Place, list[Acts]]):
    """What the compositions of a step's rows do: by place, what is called beside the product there.

    Args:
        acting: of each group.
        of: each row's group.
        counts: its tokens.
    """

    def __init__(
        self, stack: Stack, acting: Sequence[Acting], of: Sequence[int], counts: Sequence[int], device: torch.device
    ) -> None:
        super().__init__()
        self.acting = list(acting)
        self.stack = stack
        tokens: list[list[int]] = [[] for _ in acting]
        end = 0
        for group, count in zip(of, counts, strict=True):
            tokens[group] += range(end, end + count)
            end += count
        stack.hold([a for a in acting if a.lows])
        self.changes = stack.changes
        slots = {stack.slots.index(a): own for a, own in zip(acting, tokens, strict=True) if a.lows}
        few = {slot: own for slot, own in slots.items() if len(own) <= FEW}
        span = slice(min(few, default=0), max(few, default=0) + 1)  # all slots of it would be multiplied
        few = few if len(few) > 1 and 2 * len(few) >= span.stop - span.start else {}
        for slot, own in slots.items():
            if slot not in few:
                self._add(partial(partial, update, placed(own, device)), slice(slot, slot + 1))
        if few:
            near = {slot - span.start: own for slot, own in few.items()}
            self._add(grouped(near, span.stop - span.start, end, device), span)
        for a, own in zip(acting, tokens, strict=True):
            self._add_others(a, placed(own, device))

    @property
    def low(self) -> bool:
        """Whether there are low-rank updates and known bottlenecks only."""
        return not any(a.others or a.in_modules or not all(t.known for t in a.tails.values()) for a in self.acting)

    @property
    def current(self) -> bool:
        """Whether the stack still is what it was made for."""
        return self.changes == self.stack.changes

    def _add(self, what: ByFactors, slots: slice) -> None:
        for place, factors in self.stack.of(slots).items():
            self.setdefault(place, []).append(what(*factors))

    def _add_others(self, acting: Acting, index: Index) -> None:
        for place, others in acting.others.items():
            self.setdefault(place, []).extend(partial(other.apply, index) for other in others)
        for place, tail in acting.tails.items():
            self.setdefault(place, []).append(partial(tail.apply, index))
