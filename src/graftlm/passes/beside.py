"""What adapters do in a lean step (see `architectures.lean`) beside each of its products, for rows of several compositions.

Low-rank updates of a composition are joined over the layers of a product: A [in, r] and B [r, out] with zeros where a
layer's rank meets another layer's columns. Rows of one token each go through two batched products, each row by its own
factors; several tokens of a row, and rows that all share a composition, by plain ones. Other changes and bottlenecks go by
their own functions, composition by composition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..architectures.lean import Lean
from ..layers.adapted import Adapted
from ..layers.change import Change, Held, LowRank
from ..layers.frozen import Frozen
from ..methods.bottleneck import OutputHook
from ..routing import Group, Index

if TYPE_CHECKING:
    from ..adapters import AdapterSet

Place = tuple[int, str]  # a layer, and a product in it
Factors = tuple[Tensor, Tensor]  # A [in, r] and B [r, out], or of several rows [rows, in, r] and [rows, r, out]


@dataclass(frozen=True)
class Other:
    """What of a composition is no low-rank update: changes of one layer, whose columns of the joint output these are."""

    layer: Adapted
    columns: slice
    parts: list[tuple[Change, Held]]

    def apply(self, y: Tensor, x: Tensor, index: Index) -> None:
        """Change y [N, out], in place, where `index` says; x [N, in]."""
        columns = y[:, self.columns]
        came = x[index]
        first, *inputs = self.layer._enter(self.parts, came)
        part = columns[index] if first is came else self.layer.base_layer(first)
        columns[index] = self.layer._leave(self.parts, inputs, part, [], True)


class Acting:
    """One composition in a lean form.

    Attributes:
        factors: of its low-rank updates, by place.
        others: other changes, by place.
        tails: bottlenecks behind a product, by place.
        whole: whether that is all that the composition does.
    """

    def __init__(self, host: AdapterSet, form: Lean, group: Group) -> None:
        self.factors: dict[Place, Factors] = {}
        self.others: dict[Place, list[Other]] = {}
        self.tails: dict[Place, tuple[OutputHook, list[str]]] = {}
        soft = [host.prompt_encoder[n] for n in group if any(host.counts((n,)))]  # in the cache, in front of rows
        found = {id(p) for module in (*_called(form), *soft) for p in module.parameters()}
        for number, layer in enumerate(form.layers):
            for name, site in layer.sites.items():
                found |= self._read(host, group, (number, name), site)
        self.whole = all(id(p) in found for n in group for _, p in host.adapter_parameters(n))

    def _read(self, host: AdapterSet, group: Group, place: Place, site: Any) -> set[int]:
        """What the composition does at a product; the ids of its parameters there."""
        found: set[int] = set()
        lows: list[tuple[slice, LowRank]] = []
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
            self.factors[place] = joined(lows, site.columns[-1].stop)
        return found


def _called(form: Lean) -> list[Any]:
    """Modules that a lean step calls as they stand, adapters and all."""
    norms = [norm for layer in form.layers for norm in layer.norms]
    return [form.backbone.embed_tokens, form.backbone.norm, form.base.get_output_embeddings(), *norms]


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


def joined(lows: Sequence[tuple[slice, LowRank]], width: int) -> Factors:
    """A [in, r] and B [r, width] of updates of several layers, each of which has its columns."""
    a = torch.cat([low.a for _, low in lows]).t().contiguous()
    b = a.new_zeros(a.shape[1], width)
    start = 0
    for columns, low in lows:
        end = start + low.a.shape[0]
        b[start:end, columns] = low.b.t() * low.scale
        start = end
    return a, b


class Beside:
    """What compositions do beside the products of a form, for rows in any order.

    Args:
        acting: of each group.
    """

    def __init__(self, groups: Sequence[Group], acting: Sequence[Acting]) -> None:
        self.groups = list(groups)
        self.acting = list(acting)
        self.low = [i for i, a in enumerate(acting) if a.factors]  # groups with low-rank updates
        self.stacked = self._stacked()
        self._gathered: dict[tuple[int, ...], dict[Place, Factors]] = {}

    def _stacked(self) -> dict[Place, Factors]:
        """Factors of all groups that have some [groups, in, r] and [groups, r, out], the smaller ranks filled with zeros."""
        if len(self.low) < 2:
            return {}
        made: dict[Place, Factors] = {}
        for place in {place for i in self.low for place in self.acting[i].factors}:
            own = [self.acting[i].factors.get(place) for i in self.low]
            a, b = next(f for f in own if f is not None)
            rank, dtype = max(f[0].shape[1] for f in own if f is not None), _widest(own)
            shape = len(self.low), a.shape[0], rank, b.shape[1]
            made[place] = a.new_zeros(shape[:3], dtype=dtype), a.new_zeros(shape[0], *shape[2:], dtype=dtype)
            for i, factors in enumerate(own):
                if factors is not None:
                    made[place][0][i, :, : factors[0].shape[1]] = factors[0]
                    made[place][1][i, : factors[0].shape[1]] = factors[1]
        return made

    def gathered(self, which: tuple[int, ...]) -> dict[Place, Factors]:
        """The factors of rows, each of one of `self.low`; those of the last rows are kept."""
        if which == tuple(range(len(self.low))):
            return self.stacked
        if which not in self._gathered:
            self._gathered.clear()
            at = torch.tensor(which, device=next(iter(self.stacked.values()))[0].device)
            self._gathered[which] = {place: (a[at], b[at]) for place, (a, b) in self.stacked.items()}
        return self._gathered[which]

    def over(self, of: Sequence[int], counts: Sequence[int], device: torch.device) -> RowsBeside:
        """For rows of these groups with so many tokens each."""
        return RowsBeside(self, of, counts, device)


def _widest(factors: Sequence[Factors | None]) -> torch.dtype:
    dtype = torch.float32 if len({f[0].dtype for f in factors if f is not None}) > 1 else None
    return dtype or next(f[0].dtype for f in factors if f is not None)


class RowsBeside:
    """The same for the rows of a step; it is called beside each product."""

    def __init__(self, beside: Beside, of: Sequence[int], counts: Sequence[int], device: torch.device) -> None:
        ends = torch.tensor(counts).cumsum(0).tolist()
        tokens = {i: [] for i in set(of)}  # type: dict[int, list[int]]
        for group, end, count in zip(of, ends, counts, strict=True):
            tokens[group] += range(end - count, end)
        self.places = {group: _index(at, device) for group, at in tokens.items()}
        self.acting = {group: beside.acting[group] for group in tokens}
        single = [(end - 1, g) for g, end, count in zip(of, ends, counts, strict=True) if count == 1 and g in beside.low]
        self.steps: list[tuple[Index, dict[Place, Factors]]] = []
        taken: set[int] = set()
        if len({g for _, g in single}) > 1:
            which = tuple(beside.low.index(g) for _, g in single)
            taken = {at for at, _ in single}
            self.steps.append((_index([at for at, _ in single], device), beside.gathered(which)))
        for group, at in tokens.items():
            rest = [t for t in at if t not in taken]
            if rest and group in beside.low:
                self.steps.append((_index(rest, device), beside.acting[group].factors))

    def __call__(self, y: Tensor, x: Tensor, layer: int, site: str) -> Tensor:
        place = layer, site
        for index, factors in self.steps:
            if (pair := factors.get(place)) is not None:
                update(y, x, index, *pair)
        for group, acting in self.acting.items():
            index = self.places[group]
            for other in acting.others.get(place, ()):
                other.apply(y, x, index)
            if (tail := acting.tails.get(place)) is not None:
                y[index] = tail[0].added(tail[1], y[index], {})
        return y


def _index(places: list[int], device: torch.device) -> Index:
    """A slice where places lie side by side."""
    first, last = places[0], places[-1] + 1
    return slice(first, last) if last - first == len(places) else torch.tensor(places, device=device)


def update(y: Tensor, x: Tensor, index: Index, a: Tensor, b: Tensor) -> None:
    """``y[index] += x[index] A B`` in place; y [N, out], x [N, in]; A and B of all these tokens, or of each."""
    part = x[index].to(a.dtype)
    added = part @ a @ b if a.dim() == 2 else torch.bmm(torch.bmm(part[:, None], a), b)[:, 0]
    y[index] += added.to(y.dtype)
