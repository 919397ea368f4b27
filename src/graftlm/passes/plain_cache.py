"""The reference of an engine's cache: keys and values of each row in plain tensors, attention row by row.

Shapes: N new tokens of all rows, n of one; H query heads, G key heads, D head size, M places of a row.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..architectures.fast import packed_attention
from .state import Memory


@dataclass(frozen=True)
class FrontMemory:
    """What stands in front of every row of a composition: per layer keys and values [kv_heads, K + P, head_dim] (none where
    nothing does), and how many places it takes."""

    memory: Memory
    length: int


class PlainCache:
    """Keys and values of each row in plain tensors. An engine's cache does the same in blocks, with kernels of its own.

    Args:
        served: the base (`passes.served.Served`); its windows, slopes and configurations are read.
    """

    def __init__(self, served: Any) -> None:
        self.served = served
        self.kept: dict[Any, Memory] = {}  # by row, per layer [kv_heads, places, head_dim]

    def join(self, row: Any, front: FrontMemory) -> None:
        """A row begins, behind its front."""
        self.kept[row] = list(front.memory)

    def leave(self, row: Any) -> None:
        """A row is done."""
        del self.kept[row]

    def over(self, rows: list[tuple[Any, int]]) -> PlainAttention:
        """The attention of a step: its rows in their order, and how many new tokens each has."""
        return PlainAttention(self, rows)

    def extend(self, row: Any, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a row in a layer, the new ones [kv_heads, n, head_dim] behind those before."""
        kept = self.kept[row]
        if layer < len(kept):
            keys, values = (torch.cat((old, new), dim=1) for old, new in zip(kept[layer], (keys, values), strict=True))
            kept[layer] = keys, values
        else:
            kept.append((keys, values))
        return keys, values


@dataclass(frozen=True, eq=False)
class PlainAttention:
    """Attention of one step over a `PlainCache`, row by row."""

    cache: PlainCache
    rows: list[tuple[Any, int]]

    def installed(self) -> AbstractContextManager:
        return packed_attention(self.cache.served.configs)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float, p: float = 0.0, both: Tensor | None = None
    ) -> Tensor:
        """q [H, N, D], k and v [G, N, D] -> [N, H, D]."""
        made, start = [], 0
        for row, count in self.rows:
            own = slice(start, start + count)
            keys, values = self.cache.extend(row, layer, k[:, own], v[:, own])
            made.append(self.one(q[:, own], keys, values, layer, scale))
            start += count
        return torch.cat(made, dim=1).transpose(0, 1)

    def one(self, q: Tensor, keys: Tensor, values: Tensor, layer: int, scale: float) -> Tensor:
        """q [H, n, D] of a row's last places over all of its keys and values [G, M, D] -> [H, n, D]."""
        served, (heads, count, _), length = self.cache.served, q.shape, keys.shape[1]
        keys, values = (t.repeat_interleave(heads // t.shape[0], dim=0) for t in (keys, values))
        scores = q @ keys.transpose(1, 2) * scale
        places = torch.arange(length, device=q.device)
        back = places[length - count :, None] - places  # [n, M]: how far back a key lies
        if served.slopes is not None:
            scores = scores + (served.slopes.to(q.device)[:, None, None] * places).to(scores.dtype)
        window = served.windows[layer] if served.windows else None
        hidden = back < 0 if window is None else (back < 0) | (back >= window)
        return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values
