"""What adapters do in a lean step (see `architectures.lean`) beside each of its products, for rows of several compositions.

Low-rank updates of a composition are joined over the layers of a product: A [in, L r], and B [L, r, out / L] where its L
layers have one width, else one of L = 1 with zeros where a layer's rank meets another layer's columns. Those of all
compositions of a step lie in one `Stack`, a slot each:

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
from ..layers.change import Change, Held, LowRank
from ..layers.frozen import Frozen
from ..methods.bottleneck import Adapter as Bottleneck
from ..methods.bottleneck import OutputHook
from ..routing import Group, Index
from .slots import ByFactors, grouped, placed, update

if TYPE_CHECKING:
    from ..adapters import AdapterSet

Place = tuple[int, str]  # a layer, and a product in it
Low = list[tuple[int, LowRank]]  # updates of the layers of a product, each with its layer's number in it
FEW = 8  # tokens of a composition that go with those of others


@dataclass(frozen=True)
class Shape:
    """A composition's low-rank updates at a product: the size of what they read; each layer's ranks in sum, and columns."""

    size: int
    ranks: tuple[int, ...]
    columns: tuple[slice, ...]


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


class Stack:
    """Joint factors of the low-rank updates of compositions, by place: A [slots, in, L r] and B [slots, L, r, width], the
    smaller ranks filled with zeros. Slots are written as compositions come, and taken by others when nobody wants them.

    Attributes:
        slots: whose each is.
        changes: how often something was written.
    """

    def __init__(self) -> None:
        self.slots: list[Acting | None] = []
        self.changes = 0
        self._room = 0  # slots that there is memory for
        self._factors: dict[Place, tuple[Tensor, Tensor]] = {}
        self._views: dict[tuple[int, int], Factors] = {}  # as they were asked for since the last change

    def of(self, slots: slice) -> Factors:
        """The factors of some slots, at the places where one of these has any."""
        key = slots.start, slots.stop
        if key not in self._views:
            places = {place for acting in self.slots[slots] if acting is not None for place in acting.lows}
            self._views[key] = {p: (a[slots], b[slots]) for p, (a, b) in self._factors.items() if p in places}
        return self._views[key]

    @torch.no_grad()
    def hold(self, wanted: Sequence[Acting]) -> None:
        """Have the factors of these."""
        missing = [acting for acting in wanted if acting not in self.slots]
        if not missing:
            return
        self.changes += 1
        self._views = {}
        spare = [i for i, acting in enumerate(self.slots) if acting not in wanted]
        more = max(0, len(missing) - len(spare))
        if len(self.slots) + more > self._room or not self._fit(missing):
            self._make(wanted)
            return
        spare += range(len(self.slots), len(self.slots) + more)
        self.slots += [None] * more
        for slot, acting in zip(spare, missing, strict=False):
            self._write(slot, acting)

    def drop(self, gone: Sequence[Acting]) -> None:
        """Forget these: their values change."""
        self.slots = [None if acting in gone else acting for acting in self.slots]
        self._views = {}

    def _fit(self, new: Sequence[Acting]) -> bool:
        """Whether there is place for the factors of these."""
        for acting in new:
            for place, shape in acting.shapes.items():
                a, b = self._factors.get(place, (None, None))
                if a is None or b is None or _rank(shape, b.shape[1]) > b.shape[2]:
                    return False
                if any(low.a.dtype is not a.dtype for _, low in acting.lows[place]):
                    return False
        return True

    def _make(self, wanted: Sequence[Acting]) -> None:
        self.slots, self._factors = [None] * len(wanted), {}
        self._room = 1 << (len(wanted) - 1).bit_length()  # they come one by one
        for place in {place for acting in wanted for place in acting.lows}:
            own = [acting for acting in wanted if place in acting.lows]
            shape, factors = own[0].shapes[place], [low.a for acting in own for _, low in acting.lows[place]]
            out = shape.columns[-1].stop
            sizes = []  # of what is read of a slot, in one piece and in one a layer
            for count in _divisions(shape.columns):
                rank = max(_rank(acting.shapes[place], count) for acting in own)
                sizes.append((rank * (shape.size * count + out), count, rank))
            _, count, rank = min(sizes)
            dtype = factors[0].dtype if len({f.dtype for f in factors}) == 1 else torch.float32
            shapes = (shape.size, count * rank), (count, rank, out // count)
            made = (factors[0].new_zeros(self._room, *sides, dtype=dtype) for sides in shapes)
            self._factors[place] = tuple(made)  # type: ignore[assignment]
        for slot, acting in enumerate(wanted):
            self._write(slot, acting)

    def _write(self, slot: int, acting: Acting) -> None:
        self.slots[slot] = acting
        downs: list[Tensor] = []
        ups: list[Tensor] = []
        lows = [low for place in self._factors for _, low in acting.lows.get(place, ())]
        for place, (a, b) in self._factors.items():
            (_, count, rank, width), own = b.shape, acting.lows.get(place, ())
            down, up, filled = a[slot], b[slot], [0] * count  # ranks, by part of B
            if sum(len(low.a) for _, low in own) < down.shape[1] or (count == 1 and own[0][0] != own[-1][0]):
                down.zero_()
                up.zero_()
            for layer, low in own:
                columns = acting.shapes[place].columns[layer] if count == 1 else slice(0, width)
                part, size = layer if count > 1 else 0, len(low.a)
                downs.append(down.narrow(1, part * rank + filled[part], size))
                ups.append(up[part].narrow(0, filled[part], size).narrow(1, columns.start, columns.stop - columns.start))
                filled[part] += size
        if lows:  # hundreds of small tensors: each by itself would take its time in Python
            torch._foreach_copy_(downs, [low.a.t() for low in lows])
            torch._foreach_copy_(ups, [low.b.t() for low in lows])
            torch._foreach_mul_(ups, [float(low.scale) for low in lows])


Factors = dict[Place, tuple[Tensor, Tensor]]


def _divisions(columns: tuple[slice, ...]) -> list[int]:
    """In how many parts B may lie."""
    widths = {part.stop - part.start for part in columns}
    return [1, len(columns)] if len(columns) > 1 and len(widths) == 1 else [1]


def _rank(shape: Shape, count: int) -> int:
    """The rank that B needs in so many parts."""
    return sum(shape.ranks) if count == 1 else max(shape.ranks)


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
