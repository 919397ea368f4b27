"""The key-value cache of a server: one preallocated pair of tensors a layer, whose places rows hold as extents (`space`).

Shapes: H query heads, G key heads, D head size, A places of the cache, N new tokens of a step, M places that a part sees.

    keys [G, A, D]   |row a: front, tokens …, free|row b …|        |row c …                      |
    step             new keys go to their places, all rows at once; then rows attend to their own extents: decoding rows
                     of one size that lie (almost) side by side in one product, a chunk of a prompt in one of its own

Keys and values of a place lie side by side in memory [A, 2 G, D] where their sizes are one, and are written together.

Rows lie from the start of their extent, so that nothing moves when another row joins, leaves or grows. What a place held
before does not matter: its row sees its own places only. The tensors double while there are rows for more places.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..architectures.fast import packed_attention
from .space import Extent

if TYPE_CHECKING:
    from ..passes.served import Served
    from ..passes.state import Memory


class KeyValueCache:
    """Keys and values of all rows.

    Args:
        served: the base; what its layers' attention is like.
        capacity: places that there may be.
    """

    FIRST = 256  # places to begin with

    def __init__(self, served: Served, capacity: int) -> None:
        self.served = served
        self.capacity = capacity
        self.size = min(self.FIRST, capacity)
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # [G, A, D] each, from a layer's first keys on
        self.joint: dict[int, Tensor] = {}  # the same as they lie in memory [A, 2 G, D]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for pair in self.layers.values() for t in pair)

    def hold(self, end: int) -> None:
        """Have room for places up to `end`."""
        if end <= self.size:
            return
        while self.size < end:
            self.size *= 2
        self.size = min(self.size, self.capacity)
        for layer, before in list(self.layers.items()):
            for new, old in zip(self._make(layer, *before), before, strict=True):
                new[:, : old.shape[1]] = old

    def of(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's tensors; they are made by the first keys and values [G, n, D] that it has."""
        return self.layers[layer] if layer in self.layers else self._make(layer, keys, values)

    def _make(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Zeros for keys and values [G, n, D] such as these: what is masked must be finite."""
        with torch.inference_mode(False):  # lean steps run in that mode, others do not, and both write
            if keys.shape == values.shape and keys.dtype is values.dtype:
                groups, _, size = keys.shape
                joint = torch.zeros(self.size, 2 * groups, size, dtype=keys.dtype, device=keys.device)
                self.joint[layer] = joint
                made = joint[:, :groups].transpose(0, 1), joint[:, groups:].transpose(0, 1)
            else:
                shapes = ((t, (t.shape[0], self.size, t.shape[2])) for t in (keys, values))
                made = tuple(torch.zeros(shape, dtype=t.dtype, device=t.device) for t, shape in shapes)  # type: ignore[assignment]
        self.layers[layer] = made
        return made

    # -- rows ------------------------------------------------------------------------------------------------------------
    def fill(self, start: int, memory: Memory, count: int | None = None) -> int:
        """Write the first `count` (all) keys and values of a memory to the places from `start` on; the place behind them."""
        for layer, (keys, values) in enumerate(memory):
            count = keys.shape[1] if count is None else count
            for kept, new in zip(self.of(layer, keys, values), (keys, values), strict=True):
                kept[:, start : start + count] = new[:, :count]
        return start + (count or 0)

    def read(self, start: int, count: int) -> Memory:
        """A copy of keys and values."""
        at = slice(start, start + count)
        return [(k[:, at].clone(), v[:, at].clone()) for _, (k, v) in sorted(self.layers.items())]

    def move(self, source: int, target: int, count: int) -> None:
        """Copy places elsewhere; the two may not overlap."""
        for pair in self.layers.values():
            for kept in pair:
                kept[:, target : target + count] = kept[:, source : source + count]

    def clear(self, extent: Extent) -> None:
        """Take away what is no finite number, and would reach through masks."""
        for pair in self.layers.values():
            for kept in pair:
                kept[:, extent.start : extent.start + extent.size] = 0

    def over(self, spans: Many[Span]) -> CacheAttention:
        """The attention of a step over these rows."""
        self.hold(max(span.extent.start + span.extent.size for span in spans))
        return CacheAttention(self, spans)


@dataclass(frozen=True)
class Span:
    """A row's part of a step: its extent, the places that are filled, and how many new tokens it has."""

    extent: Extent
    filled: int
    count: int


class CacheAttention:
    """Attention of one step, row by row over what the cache keeps of each, the step's own tokens included."""

    def __init__(self, cache: KeyValueCache, spans: Many[Span]) -> None:
        self.cache = cache
        self.device = cache.served.host.adapter_device
        places = [p for s in spans for p in range(s.extent.start + s.filled, s.extent.start + s.filled + s.count)]
        self.places = torch.tensor(places, device=self.device)
        ends = accumulate(span.count for span in spans)
        first = {span: end - span.count for span, end in zip(spans, ends, strict=True)}  # of its tokens
        lying = sorted(spans, key=lambda s: (s.count > 1, s.extent.size, s.extent.start, s.filled))
        self.parts = [Part(run, cache.served.slopes, self.device) for run in runs(lying)]
        tokens = [t for part in self.parts for s in part.slots for t in range(first[s], first[s] + s.count)]
        self.order = self.back = None  # tokens as their rows lie, and where each of the step's own order is then
        if tokens != list(range(len(places))):
            self.order = torch.tensor(tokens, device=self.device)
            found = {token: at for at, token in reversed(list(enumerate(tokens)))}
            self.back = torch.tensor([found[token] for token in range(len(places))], device=self.device)

    def installed(self) -> AbstractContextManager:
        return packed_attention(self.cache.served.configs)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float, p: float = 0.0, both: Tensor | None = None
    ) -> Tensor:
        """q [H, N, D], k and v [G, N, D] -> [N, H, D]; `both` [N, 2 G, D]: these two, where they lie side by side."""
        keys, values = self.cache.of(layer, k, v)
        joint = None if both is None else self.cache.joint.get(layer)
        if joint is not None and both is not None:
            joint.index_copy_(0, self.places, both.to(joint.dtype))
        else:
            keys.index_copy_(1, self.places, k.to(keys.dtype))
            values.index_copy_(1, self.places, v.to(values.dtype))
        windows = self.cache.served.windows
        window = windows[layer] if windows else None
        made, start = [], 0
        q = q if self.order is None else q.index_select(1, self.order)
        for part in self.parts:
            own = q if len(self.parts) == 1 else q[:, start : start + part.tokens]
            made.append(part.attend(own, keys, values, window, scale))
            start += part.tokens
        found = made[0] if len(made) == 1 else torch.cat(made)
        return found if self.back is None else found.index_select(0, self.back)


_HOLES = 2  # extents of nobody that decoding rows on both sides attend over, too: cheaper than two products


def runs(spans: Many[Span]) -> list[list[Span]]:
    """Spans that attend in one product: decoding rows whose extents are of one size and lie side by side, or almost. Spans
    come in the order of their sizes and places."""
    found: list[list[Span]] = []
    for span in spans:
        before = found[-1][-1] if found else span
        near = 0 < span.extent.start - before.extent.start <= (_HOLES + 1) * span.extent.size
        if near and span.count == before.count == 1 and span.extent.size == before.extent.size:
            found[-1].append(span)
        else:
            found.append([span])
    return found


class Part:
    """Rows R that attend in one product: one token each, or one row with several.

    Attributes:
        slots: whose extents they are, from the first to the last; for those that are nobody's here, the first row's.
    """

    def __init__(self, spans: list[Span], slopes: Tensor | None, device: torch.device) -> None:
        self.slopes = slopes
        self.device = device
        self.start, self.size = spans[0].extent.start, spans[0].extent.size
        own = {(span.extent.start - self.start) // self.size: span for span in spans}
        self.slots = [own.get(at, spans[0]) for at in range(max(own) + 1)]
        self.rows, self.count = len(self.slots), spans[0].count
        self.tokens = self.rows * self.count
        self.first = min(span.filled for span in spans)  # place of the first new token of any row
        self.end = max(span.filled + span.count for span in spans)
        self._masks: dict[tuple, Tensor | None] = {}

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, window: int | None, scale: float) -> Tensor:
        """q [H, R n, D] over the cache [G, A, D] -> [R n, H, D]. Heads that read the same keys stand as so many queries."""
        groups, (heads, _, size) = keys.shape[0], q.shape
        shared, least = heads // groups, 0 if window is None else max(0, self.first + 1 - window)
        k, v = (self.seen(t, least) for t in (keys, values))  # [R, G, M, D]
        if self.count == 1:
            by_head, by_row, by_entry = q.stride()
            q = q.as_strided((self.rows, groups, shared, size), (by_row, shared * by_head, by_head, by_entry))
        else:
            q = q.reshape(1, groups, shared * self.count, size)
        made = F.scaled_dot_product_attention(q, k, v, self.mask(q, groups, shared, window, least), scale=scale)
        if self.count == 1:
            return made.reshape(self.rows, heads, -1)
        return made.reshape(heads, self.count, -1).transpose(0, 1)

    def seen(self, kept: Tensor, least: int) -> Tensor:
        """The rows' places [G, A, D] from `least` to the end of the longest: [R, G, M, D], without a copy."""
        (groups, _, size), (by_group, by_place, _) = kept.shape, kept.stride()
        shape, strides = (self.rows, groups, self.end - least, size), (self.size * by_place, by_group, by_place, 1)
        return kept.as_strided(shape, strides, kept.storage_offset() + (self.start + least) * by_place)

    def mask(self, q: Tensor, groups: int, shared: int, window: int | None, least: int) -> Tensor | None:
        """What is added to the scores [R, G or 1, queries or 1, M]; the same in all layers with this window."""
        key = window, q.dtype, groups, shared
        if key not in self._masks:
            alone = self.rows == 1 and self.count == 1
            self._masks[key] = None if alone and self.slopes is None else self._mask(q, groups, shared, window, least)
        return self._masks[key]

    def _mask(self, q: Tensor, groups: int, shared: int, window: int | None, least: int) -> Tensor:
        places = torch.arange(least, self.end, device=self.device)
        own = torch.tensor([s.filled + i for s in self.slots for i in range(s.count)], device=self.device)
        back = own[:, None] - places  # [R n, M]: how far back a place lies
        hidden = back < 0 if window is None else (back < 0) | (back >= window)
        mask = torch.zeros(hidden.shape, dtype=q.dtype, device=self.device).masked_fill_(hidden, -torch.inf)
        mask = mask.view(self.rows, 1, 1, self.count, -1)
        if self.slopes is not None:  # how near a place lies to the last one: softmax does not see the difference
            bias = self.slopes.to(self.device).view(1, groups, shared, 1, 1) * (places - (self.end - 1))
            mask = mask + bias.to(q.dtype)
        elif self.count > 1:
            mask = mask.expand(-1, -1, shared, -1, -1)
        return mask.flatten(2, 3)
