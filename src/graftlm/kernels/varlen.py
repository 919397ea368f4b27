"""Attention of a packed row by the flash kernel for sequences of different lengths (arXiv:2307.08691), on GPUs.

Shapes as in `attention`: q [H, N, D], k and v [G, N, D] -> [N, H, D].
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .order import first_order
from .piece import Piece


@functools.cache
def kernel() -> Any:
    """torch's function, or None where this torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def takes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel runs there: half precision on an Ampere GPU or a later one."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or torch.version.hip is not None:
        return False
    return kernel() is not None and torch.cuda.get_device_capability(device) >= (8, 0)


class Layout:
    """Where each sequence's queries begin, and which keys it sees: prefix, shared tokens, its own.

    Args:
        pieces: of the row; tokens of memories are numbered first, in their order, then those of the row.
        memories: tokens of each.
    """

    def __init__(self, pieces: list[Piece], memories: list[int], device: torch.device) -> None:
        begins = [sum(memories[:i]) for i in range(len(memories))]
        row = sum(memories)
        seen, queries, keys = [], [0], [0]
        for piece in pieces:
            parts = [torch.arange(row + piece.start, row + piece.end)]
            if piece.front[1] > piece.front[0]:
                parts.insert(0, torch.arange(row + piece.front[0], row + piece.front[1]))
            if piece.memory is not None:
                begin = begins[piece.memory]
                parts.insert(0, torch.arange(begin, begin + memories[piece.memory]))
            seen += parts
            queries.append(piece.end)
            keys.append(keys[-1] + sum(map(len, parts)))
        index = torch.cat(seen)
        self.index = None if len(index) == queries[-1] and row == 0 else index.to(device)
        self.queries, self.keys = (torch.tensor(t, dtype=torch.int32, device=device) for t in (queries, keys))
        self.longest = [max(b - a for a, b in zip(t, t[1:], strict=False)) for t in (queries, keys)]


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, memory: list[Tensor], scale: float) -> Tensor:
    """Causal attention of every sequence: its last query sees all of its keys. memory: keys, values, keys, … [G, M, D]."""
    seen = []
    for own, kept in ((k, memory[::2]), (v, memory[1::2])):
        every = torch.cat((*kept, own), 1) if kept else own
        seen.append((every if layout.index is None else _Repeated.apply(every, layout.index)).transpose(0, 1).contiguous())
    return kernel()(
        q.transpose(0, 1).contiguous(), *seen, layout.queries, layout.keys, *layout.longest, scale=scale,
        window_size=(-1, 0), enable_gqa=q.shape[0] != k.shape[0],
    )  # fmt: skip


class _Repeated(torch.autograd.Function):
    """Tokens [G, N, D] at places of their axis, [G, seen, D]; their gradients are summed in fp32 at least."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count = tokens.shape[1]
        return tokens.index_select(1, index)

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        wide = torch.promote_types(gradient.dtype, torch.float32)
        total = gradient.new_zeros(gradient.shape[0], ctx.count, gradient.shape[2], dtype=wide)
        return total.index_add_(1, index, gradient.to(wide)).to(gradient.dtype), None
