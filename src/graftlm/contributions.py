"""What adapters contribute at the entry points, put together: side by side in a composition, by row in a mixed batch.

Shapes: B rows, P virtual tokens, K prefix entries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .routing import Plan

Memory = list[tuple[Tensor, Tensor]]


def side_by_side(memories: list[Memory], dtype: torch.dtype) -> Memory:
    """The prefixes of a composition as one, in `dtype`: per layer (K, V) [kv_heads, K_i, head_dim] joined along K_i."""
    joined = (
        memories[0]
        if len(memories) == 1
        else [tuple(torch.cat(parts, dim=-2) for parts in zip(*layer, strict=True)) for layer in zip(*memories, strict=True)]
    )
    return [(k.to(dtype), v.to(dtype)) for k, v in joined]


def by_row(plan: Plan, batch: int, tables: list[Tensor | None]) -> Tensor:
    """Tables [..., P_i, W], one a group (None: empty), for each of `batch` rows [B, ..., P, W], zeros in front."""
    like = next(t for t in tables if t is not None)
    if plan.routes is None:
        return like.expand(batch, *like.shape)
    most = max(t.shape[-2] for t in tables if t is not None)
    none = like.new_zeros(*like.shape[:-2], most, like.shape[-1])
    filled = [none if t is None else F.pad(t, (0, 0, most - t.shape[-2], 0)) for t in tables]
    return torch.stack(filled)[plan.routes.each(batch, like.device)]
