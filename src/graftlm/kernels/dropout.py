"""Dropout whose masks are cheap on CPUs: 16 random bits an element, four elements a draw.

torch draws a Bernoulli number for each element, one thread at a time. Here the probability is rounded to a multiple of
2^-16 (0.05 becomes 0.050003) and the scale is that of the rounded one, so the expectation is exact.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .order import first_order

_LEVELS = 65536


#: Rows (of the last axis) that a mask is drawn for besides those of its input, as if that were padded by so many.
extra_rows: ContextVar[int] = ContextVar("graftlm_extra_rows", default=0)


def keep_mask(like: Tensor, p: float) -> tuple[Tensor, float]:
    """A mask of `like`'s shape that is 0 with probability `p` (rounded), else 1, and the scale 1 / (1 - p).

    The mask is of bytes: torch's comparisons and products of booleans take about five times as long.
    """
    drop = round(p * _LEVELS)
    words = (like.numel() + extra_rows.get() * like.shape[-1] + 3) // 4
    info = torch.iinfo(torch.int64)
    draws = torch.randint(info.min, info.max, (words,), dtype=torch.int64, device=like.device)
    kept = torch.empty(like.shape, dtype=torch.uint8, device=like.device)
    torch.ge(draws.view(torch.int16)[: like.numel()].view(like.shape), drop - _LEVELS // 2, out=kept)
    return kept, _LEVELS / (_LEVELS - drop)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        kept, ctx.scale = keep_mask(x, p)
        ctx.save_for_backward(kept)
        return (x * kept).mul_(ctx.scale)

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return (gradient * ctx.saved_tensors[0]).mul_(ctx.scale), None


def is_cheap(x: Tensor, p: float) -> bool:
    """Whether the cheap mask stands for torch's here."""
    return x.device.type == "cpu" and 1 / _LEVELS <= p < 1 and not torch.compiler.is_compiling()


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """x with elements set to zero with probability `p`, the others scaled by 1 / (1 - p)."""
    if training and is_cheap(x, p):
        return _Dropout.apply(x, p)
    return F.dropout(x, p, training)


class CheapDropout(TorchFunctionMode):
    """Within the block `torch.nn.functional.dropout` draws its masks in the cheap way."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return (_like_torch if func is F.dropout else func)(*args, **kwargs or {})


def _like_torch(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return F.dropout(input, p, training, inplace) if inplace else dropout(input, p, training)
