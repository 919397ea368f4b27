"""LoRA's update of a layer's output in one autograd function (arXiv:2106.09685 eq. 3).

``y += scale * dropout(x) A^T B^T``: x [..., in], A [r, in], B [out, r], y [..., out]. Kept for the gradient: x itself
(shared by all layers that read it, no copy in another dtype), the product with A [N, r], and the dropout mask (a byte an
element).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import is_cheap, keep_mask
from .linear import plain_product
from .order import first_order


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, p: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        kept, factor = _mask(flat, p)
        ctx.scale = scale * factor
        short = plain_product(flat if kept is None else flat * kept, a.to(x.dtype))
        ctx.save_for_backward(x, a, b, short, kept)
        wide = b.to(y.dtype).t()
        if y._is_view():  # what some functions hand out may not be written into
            return torch.addmm(y.reshape(-1, y.shape[-1]), short, wide, alpha=ctx.scale).view(y.shape)
        y.view(-1, y.shape[-1]).addmm_(short, wide, alpha=ctx.scale)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, a, b, short, kept = ctx.saved_tensors
        flat = x.reshape(-1, x.shape[-1])
        outer = gradient.reshape(-1, gradient.shape[-1]).to(x.dtype)
        to_short = plain_product(outer, b.to(x.dtype).t()).mul_(ctx.scale)
        to_b = torch.mm(outer.t(), short).to(b.dtype).mul_(ctx.scale)
        to_a = torch.mm(to_short.t(), flat if kept is None else flat * kept).to(a.dtype)
        to_x = None
        if ctx.needs_input_grad[1]:
            to_x = torch.mm(to_short, a.to(x.dtype))
            to_x = (to_x if kept is None else to_x.mul_(kept)).view(x.shape)
        return gradient, to_x, to_a, to_b, None, None


def _mask(x: Tensor, p: float) -> tuple[Tensor | None, float]:
    if not p:
        return None, 1.0
    return keep_mask(x, p) if is_cheap(x, p) else (F.dropout(torch.ones_like(x), p) != 0, 1 / (1 - p))


def low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, p: float = 0.0) -> Tensor:
    """`y` with an update, added in place where that can be.

    Args:
        y: [..., out], the layer's output so far, which nothing else may need.
        x: [..., in], its input.
        a, b: [r, in] and [out, r], in any floating dtype; the products are made in y's.
        scale: of the update.
        p: probability of dropping an element of x.
    """
    with torch.autocast(y.device.type, enabled=False):
        return _LowRank.apply(y, x.to(y.dtype), a, b, scale, p)
