"""What adapters do in a lean step (see `architectures.lean`) beside each of its products, for rows of several compositions.

Low-rank updates of a composition are joined over the layers of a product: A [in, r] and B [r, out] with zeros where a
layer's rank meets another layer's columns. Those of all compositions of a step lie in one `Stack`, a slot each:

    tokens    x0 (slot 1)  x1 (slot 0)  x2 (slot 1)  x3 (base)
    by slot   [[x1, .], [x0, x2]]  [S, m, in] ─A→ [S, m, r] ─B→ [S, m, out]  added to x1, x0, x2

A composition of many tokens goes through its slot by itself. Other changes and bottlenecks go by their own functions,
composition by composition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..architectures.lean import Acts, Lean
from ..layers.adapted import Adapted
from ..layers.change import Change, Held, LowRank
from ..layers.frozen import Frozen
from ..methods.bottleneck import OutputHook
from ..routing import Group, Index

if TYPE_CHECKING:
    from ..adapters import AdapterSet

Place = tuple[int, str]  # a layer, and a product in it
Low = list[tuple[slice, LowRank]]  # updates of the layers of a product, each with its columns
FEW = 4  # tokens of a composition that go with those of others


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
        shapes: of their joint factors, by place: in, r, out.
        others: other changes, by place.
        tails: bottlenecks behind a product, by place.
        in_modules: whether something of it is in modules that a step calls as they stand.
        whole: whether that is all that the composition does.
    """

    def __init__(self, host: AdapterSet, form: Lean, group: Group) -> None:
        self.lows: dict[Place, Low] = {}
        self.shapes: dict[Place, tuple[int, int, int]] = {}
        self.others: dict[Place, list[Other]] = {}
        self.tails: dict[Place, tuple[OutputHook, list[str]]] = {}
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
        for module, columns in zip(site.modules, site.columns, strict=True):
            adapted = next((m for m in _around(module) if m.switch is host.switch), None)
            parts = [] if adapted is None else [(adapted.changes[n], adapted.held(n)) for n in group if n in adapted.changes]
            found |= {id(p) for _, t in parts for _, p in adapted.parts(t.name)}  # type: ignore[union-attr]
            own = [change.low_rank(t) for change, t in parts]
            if all(low is not None and not low.p for low in own):
                lows += [(columns, low) for low in own if low is not None]
            else:
                self.others.setdefault(place, []).append(Other(adapted, columns, parts))  # type: ignore[arg-type]
            for hook in module._forward_hooks.values():
                if isinstance(hook, OutputHook) and hook.host is host:
                    names = [n for n in group if n in hook.adapters and hook.adapters[n][1] is None]
                    found |= {id(p) for n in names for p in hook.adapters[n][0].parameters()}
                    if names:
                        self.tails[place] = hook, names
        if lows:
            self.lows[place] = lows
            a = lows[0][1].a
            self.shapes[place] = a.shape[1], sum(len(low.a) for _, low in lows), site.columns[-1].stop
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


class Stack:
    """Joint factors of the low-rank updates of compositions, by place: A [slots, in, r] and B [slots, r, out], the smaller
    ranks filled with zeros. Slots are written as compositions come, and taken by others once their own are not wanted.

    Attributes:
        slots: whose each is.
        changes: how often something was written.
    """

    def __init__(self) -> None:
        self.slots: list[Acting | None] = []
        self.changes = 0
        self._room = 0  # slots that there is memory for
        self._factors: dict[Place, tuple[Tensor, Tensor]] = {}

    @property
    def factors(self) -> dict[Place, tuple[Tensor, Tensor]]:
        """Of all slots."""
        return {place: (a[: len(self.slots)], b[: len(self.slots)]) for place, (a, b) in self._factors.items()}

    @torch.no_grad()
    def hold(self, wanted: Sequence[Acting]) -> None:
        """Have the factors of these."""
        missing = [acting for acting in wanted if acting not in self.slots]
        if not missing:
            return
        self.changes += 1
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

    def _fit(self, new: Sequence[Acting]) -> bool:
        """Whether there is place for the factors of these."""
        for acting in new:
            for place, (_, rank, _) in acting.shapes.items():
                a = self._factors[place][0] if place in self._factors else None
                if a is None or a.shape[2] < rank or any(low.a.dtype is not a.dtype for _, low in acting.lows[place]):
                    return False
        return True

    def _make(self, wanted: Sequence[Acting]) -> None:
        self.slots, self._factors = [None] * len(wanted), {}
        self._room = 1 << (len(wanted) - 1).bit_length()  # they come one by one
        for place in {place for acting in wanted for place in acting.lows}:
            own = [acting for acting in wanted if place in acting.lows]
            rank = max(acting.shapes[place][1] for acting in own)
            size, _, width = own[0].shapes[place]
            factors = [low.a for acting in own for _, low in acting.lows[place]]
            dtype = factors[0].dtype if len({f.dtype for f in factors}) == 1 else torch.float32
            made = (factors[0].new_zeros(self._room, *shape, dtype=dtype) for shape in ((size, rank), (rank, width)))
            self._factors[place] = tuple(made)  # type: ignore[assignment]
        for slot, acting in enumerate(wanted):
            self._write(slot, acting)

    def _write(self, slot: int, acting: Acting) -> None:
        self.slots[slot] = acting
        for place, (a, b) in self._factors.items():
            a[slot], b[slot] = 0, 0
            start = 0
            for columns, low in acting.lows.get(place, ()):
                end = start + len(low.a)
                a[slot, :, start:end] = low.a.t()
                torch.mul(low.b.t(), low.scale, out=b[slot, start:end, columns])
                start = end


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
                self._add(partial(update, _index(own, device)), slice(slot, slot + 1))
        if few:
            self._add(
                grouped({slot - span.start: own for slot, own in few.items()}, span.stop - span.start, end, device), span
            )
        for a, own in zip(acting, tokens, strict=True):
            self._add_others(a, _index(own, device))

    @property
    def low(self) -> bool:
        """Whether there are low-rank updates only."""
        return not any(a.others or a.tails or a.in_modules for a in self.acting)

    @property
    def current(self) -> bool:
        """Whether the stack still is what it was made for."""
        return self.changes == self.stack.changes

    def _add(self, what: Any, slots: slice) -> None:
        for place, (a, b) in self.stack.factors.items():
            if any(acting is not None and place in acting.lows for acting in self.stack.slots[slots]):
                self.setdefault(place, []).append(partial(what, a[slots], b[slots]))

    def _add_others(self, acting: Acting, index: Index) -> None:
        for place, others in acting.others.items():
            self.setdefault(place, []).extend(partial(other.apply, index) for other in others)
        for place, (hook, names) in acting.tails.items():
            self.setdefault(place, []).append(partial(tail, index, hook, names))


def grouped(few: dict[int, list[int]], slots: int, count: int, device: torch.device) -> Any:
    """How tokens, of `count`, go through slots at once: by slot those that are its."""
    most = max(map(len, few.values()))
    if most == 1 and len(few) == slots:
        return partial(update_each, _index([few[slot][0] for slot in range(slots)], device))
    tokens = [token for own in few.values() for token in own]
    places = [slot * most + i for slot, own in few.items() for i in range(len(own))]
    source = torch.zeros(slots * most, dtype=torch.long)
    source[torch.tensor(places)] = torch.tensor(tokens)
    everyone = tokens == list(range(count))
    rows = None if everyone else torch.tensor(tokens, device=device)
    return partial(update_grouped, source.to(device), torch.tensor(places, device=device), rows)


def _index(places: list[int], device: torch.device) -> Index:
    """A slice where places lie side by side in their order."""
    first, end = places[0], places[0] + len(places)
    return slice(first, end) if places == list(range(first, end)) else torch.tensor(places, device=device)


# in place: y [N, out], x [N, in]; A [S, in, r], B [S, r, out]
def update(index: Index, a: Tensor, b: Tensor, y: Tensor, x: Tensor) -> None:
    """Tokens of one slot."""
    part = x[index].to(a.dtype) @ a[0]
    if isinstance(index, slice) and y.dtype is b.dtype:
        y[index].addmm_(part, b[0])
    else:
        y[index] += (part @ b[0]).to(y.dtype)


def update_each(index: Index, a: Tensor, b: Tensor, y: Tensor, x: Tensor) -> None:
    """One token of each slot: `index` says which."""
    if isinstance(index, slice):
        part = torch.bmm(x[index].unsqueeze(1).to(a.dtype), a)
        y[index] += torch.bmm(part, b).squeeze(1).to(y.dtype)
    else:
        part = torch.bmm(x.index_select(0, index).unsqueeze(1).to(a.dtype), a)  # type: ignore[arg-type]
        y.index_add_(0, index, torch.bmm(part, b).squeeze(1).to(y.dtype))  # type: ignore[arg-type]


def update_grouped(source: Tensor, places: Tensor, rows: Tensor | None, a: Tensor, b: Tensor, y: Tensor, x: Tensor) -> None:
    """Tokens of all slots: `source` [S m] says which goes where, `places` where those that count have gone, `rows` who they
    are, None for all."""
    part = x.index_select(0, source).view(len(a), -1, x.shape[1]).to(a.dtype)
    added = torch.bmm(torch.bmm(part, a), b).view(len(source), -1).index_select(0, places).to(y.dtype)
    if rows is None:
        y.add_(added)
    else:
        y.index_add_(0, rows, added)


def tail(index: Index, hook: OutputHook, names: list[str], y: Tensor, x: Tensor) -> None:
    """Bottlenecks behind a product."""
    y[index] = hook.added(names, y[index], {})
