"""Low-rank updates of tokens whose factors lie in slots (see `beside`), in place: y [N, out], x [N, in]; A [S, in, L r],
B [S, L, r, width].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..architectures.lean import Acts

Index = slice | Tensor  # of places side by side, or of others
ByFactors = Callable[[Tensor, Tensor], Acts]


def grouped(few: dict[int, list[int]], slots: int, count: int, device: torch.device) -> ByFactors:
    """How some of a step's `count` tokens go through slots at once: by slot those that are its."""
    few = dict(sorted(few.items()))
    most = max(map(len, few.values()))
    if most == 1 and len(few) == slots:
        return partial(each, placed([few[slot][0] for slot in range(slots)], device), slots == count)
    tokens = [token for own in few.values() for token in own]
    index = placed(tokens, device)
    if isinstance(index, slice) and len(tokens) == slots * most:
        return partial(partial, update_grouped, index, None, index)
    source = torch.zeros(slots, most, dtype=torch.long)
    sides = zip(*((slot, i) for slot, own in few.items() for i in range(len(own))), strict=True)
    at = tuple(torch.tensor(side, device=device) for side in sides)
    source[at] = torch.tensor(tokens)
    return partial(partial, update_grouped, source.flatten().to(device), at, index)


def placed(places: list[int], device: torch.device) -> Index:
    """A slice where places lie side by side in their order."""
    first, end = places[0], places[0] + len(places)
    return slice(first, end) if places == list(range(first, end)) else torch.tensor(places, device=device)


def update(index: Index, a: Tensor, b: Tensor, y: Tensor, x: Tensor) -> None:
    """Tokens of one slot."""
    inner = x[index].to(a.dtype) @ a[0]
    _, count, rank, width = b.shape
    direct = isinstance(index, slice) and y.dtype is b.dtype
    rows = y[index]
    for part in range(count):
        columns, own = rows[:, part * width : (part + 1) * width], inner[:, part * rank : (part + 1) * rank]
        if direct:
            columns.addmm_(own, b[0, part])
        else:
            columns += (own @ b[0, part]).to(y.dtype)
    if not isinstance(index, slice):
        y[index] = rows


def each(index: Index, all_: bool, a: Tensor, b: Tensor) -> Acts:
    """One token of each slot: `index` says which; `all_`: there are no others."""
    slots, count, rank, width = b.shape
    flat, within, without = b.flatten(0, 1), (slots * count, 1, rank), (slots * count, 1, width)
    direct = isinstance(index, slice)
    all_ = all_ and index == slice(0, slots)

    def update_each(y: Tensor, x: Tensor) -> None:
        come = x if all_ else x[index] if direct else x.index_select(0, index)  # type: ignore[arg-type]
        inner = torch.bmm((come if come.dtype is a.dtype else come.to(a.dtype)).unsqueeze(1), a).view(within)
        if direct and y.dtype is b.dtype:
            (y if all_ else y[index]).view(without).baddbmm_(inner, flat)
        else:
            _add(y, index, torch.bmm(inner, flat).view(slots, -1))

    return update_each


def update_grouped(
    source: Index, at: tuple[Tensor, ...] | None, index: Index, a: Tensor, b: Tensor, y: Tensor, x: Tensor
) -> None:
    """Tokens of all slots: `source` [S m] says which goes where, `at` in which slot and where in it those that count are,
    None for all, `index` who they are."""
    slots, count, rank, width = b.shape
    come = x[source] if isinstance(source, slice) else x.index_select(0, source)
    inner = torch.bmm(come.view(slots, -1, x.shape[1]).to(a.dtype), a).unflatten(2, (count, rank))
    made = torch.bmm(inner.transpose(1, 2).flatten(0, 1), b.flatten(0, 1)).view(slots, count, -1, width).transpose(1, 2)
    if at is None:
        y[index].view(made.shape).add_(made.to(y.dtype))
    else:
        _add(y, index, made[at].flatten(1))


def _add(y: Tensor, index: Index, added: Tensor) -> None:
    if isinstance(index, slice):
        y[index] += added.to(y.dtype)
    else:
        y.index_add_(0, index, added.to(y.dtype))
