"""LoRA's update of a layer's output in one autograd function (arXiv:2106.09685 eq. 3).

``y += scale * dropout(x) A^T B^T``: x [..., in], A [r, in], B [out, r], y [..., out]. Kept for the gradient: x itself
(shared by all layers that read it, no copy in another dtype), the product with A [N, r], and the dropout mask (a byte an
element).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import dropout, is_cheap, keep_mask
from .linear import add_product, frozen_ways, owned, plain_product, working_dtype
from .order import first_order
from .packed import is_kept

_FEW = 150_000  # elements of input and output up to which one function costs more calls than it saves


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, p: float) -> Tensor:
        flat = _working(x).view(-1, x.shape[-1])
        kept, factor = _mask(flat, p)
        ctx.scale = scale * factor
        short = plain_product(flat if kept is None else flat * kept, a.to(flat.dtype))
        ctx.save_for_backward(x, a, b, short, kept)
        if y._is_view():  # what some functions hand out may not be written into
            y = y.clone(memory_format=torch.contiguous_format)
        else:
            ctx.mark_dirty(y)
        add_product(y.view(-1, y.shape[-1]), short, b.to(short.dtype), ctx.scale)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, a, b, short, kept = ctx.saved_tensors
        flat = _working(x).view(-1, x.shape[-1])
        outer = gradient.reshape(-1, gradient.shape[-1]).to(short.dtype)
        to_x = torch.zeros_like(flat) if ctx.needs_input_grad[1] else None
        to_x, to_a, to_b = _gradients(flat, outer, a, b, short, kept, ctx.scale, to_x)
        return gradient, None if to_x is None else to_x.view(x.shape).to(x.dtype), to_a, to_b, None, None


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float, ways: Any
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        kept, factor = _mask(flat, p)
        ctx.scale, ctx.back = scale * factor, ways[1]
        y = owned(ways[0](flat, weight, bias))
        short = plain_product(flat if kept is None else flat * kept, a.to(flat.dtype))
        ctx.save_for_backward(x, weight, a, b, short, kept)
        add_product(y, short, b.to(flat.dtype), ctx.scale)
        return owned(y.view(*x.shape[:-1], weight.shape[0]))

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, a, b, short, kept = ctx.saved_tensors
        flat = x.reshape(-1, x.shape[-1])
        outer = gradient.reshape(-1, gradient.shape[-1]).contiguous()
        to_x = ctx.back(outer, weight.t(), None) if ctx.needs_input_grad[0] else None
        to_x, to_a, to_b = _gradients(flat, outer, a, b, short, kept, ctx.scale, to_x)
        return None if to_x is None else to_x.view(x.shape), None, None, to_a, to_b, None, None, None


def _gradients(
    x: Tensor, outer: Tensor, a: Tensor, b: Tensor, short: Tensor, kept: Tensor | None, scale: float, to_x: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of ``scale * drop(x) A^T B^T`` to x [N, in], added to `to_x` (if that is wanted), to A and B, from that of
    its value [N, out].

    All are made as products ``[r, …] […, …]``: many columns of a product cost less than many rows of one.
    """
    to_short = _narrow(b.to(x.dtype).t(), outer.t()).mul_(scale)
    to_b = _narrow(short.t(), outer).t().to(b.dtype).contiguous().mul_(scale)
    to_a = _narrow(to_short, x if kept is None else x * kept).to(a.dtype)
    if to_x is not None and kept is None:
        add_product(to_x, to_short.t(), a.to(x.dtype).t(), 1.0)
    elif to_x is not None:
        to_x.add_(_narrow(to_short.t(), a.to(x.dtype)).mul_(kept))  # type: ignore[arg-type]
    return to_x, to_a, to_b


def _narrow(x: Tensor, y: Tensor) -> Tensor:
    """``x y`` of which an axis is of r: in fp32 by torch's own product, the faster for so few."""
    return torch.mm(x, y) if x.dtype is torch.float32 else plain_product(x, y.t())


def _working(x: Tensor) -> Tensor:
    """x, contiguous, in the dtype in which products with it are made."""
    return x.to(working_dtype(x.dtype, x.device)).contiguous()


def _mask(x: Tensor, p: float) -> tuple[Tensor | None, float]:
    if not p:
        return None, 1.0
    return keep_mask(x, p) if is_cheap(x, p) else (F.dropout(torch.ones_like(x), p) != 0, 1 / (1 - p))


def low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, p: float = 0.0) -> Tensor:
    """`y` with an update, added in place where that can be.

    Args:
        y: [..., out], the layer's output so far, which nothing else may need.
        x: [..., in], its input.
        a, b: [r, in] and [out, r], in any floating dtype; the products are made in y's, or, for few elements, in theirs.
        scale: of the update.
        p: probability of dropping an element of x.
    """
    with torch.autocast(y.device.type, enabled=False):
        few = y.device.type == "cpu" and x.numel() + y.numel() <= _FEW
        if few and working_dtype(x.dtype, x.device) is x.dtype:  # else a wider copy of x would be kept for each layer
            short = F.linear(dropout(x.to(a.dtype), p) if p else x.to(a.dtype), a)
            return y + F.linear((short * scale).to(b.dtype), b).to(y.dtype)
        return _LowRank.apply(y, x.to(y.dtype), a, b, scale, p)


def adapted_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float = 0.0
) -> Tensor | None:
    """``x W^T + b + scale * dropout(x) A^T B^T`` in one function, or None where the two are to be made apart.

    Args:
        x: [..., in].
        weight, bias: [out, in] and [out], frozen.
        a, b, scale, p: as in `low_rank`.
    """
    few = x.dtype is not torch.float32 and x.numel() + x.numel() // x.shape[-1] * weight.shape[0] <= _FEW
    if few or is_kept(weight) or (ways := frozen_ways(x, weight, bias)) is None:
        return None
    return _Adapted.apply(x, weight, bias, a, b, scale, p, ways)


class Update(NamedTuple):
    """One adapter's update of a part of a batch.

    Args:
        index: which part, as in `x[index]`: a slice or indices of the first axis, or after a full slice of the second, or
            indices of both.
        a, b: [r, in] and [out, r].
        scale: of the update.
        p: probability of dropping an element of the input.
        draw: the surroundings in which its dropout is drawn.
    """

    index: Any
    a: Tensor
    b: Tensor
    scale: float
    p: float
    draw: Callable[[], AbstractContextManager] = nullcontext


# One product over all adapters wastes their ranks' zeros, one for each adapter some microseconds of calls: where that many
# operations are wasted, they cost the same.
_WASTE = 1.5e6


def grouped_low_rank(y: Tensor, x: Tensor, updates: list[Update], kept: dict) -> Tensor:
    """`y` [..., out] with the updates of different adapters, each to its part of the batch; x [..., in].

    With gradients in y's dtype, as `low_rank`; without in the adapters', as a linear layer would. A few tokens go through
    one product with all A side by side (each token's others masked to zero) and one with all B, more of them through a
    pair of products for each adapter.

    Args:
        y: the layer's output so far, which nothing else may need.
        kept: where the factors side by side are kept, for calls between which they do not change.
    """
    if torch.is_grad_enabled():
        with torch.autocast(y.device.type, enabled=False):
            factors = [t for u in updates for t in (u.a, u.b)]
            return _GroupedLowRank.apply(y, x.to(y.dtype), updates, *factors)
    kind = y.device.type
    auto = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    dtypes = {auto or u.a.dtype for u in updates}
    y = y.contiguous() if not y._is_view() else y.clone(memory_format=torch.contiguous_format)
    with torch.autocast(kind, enabled=False):
        tokens, ranks = x.numel() // x.shape[-1], sum(u.a.shape[0] for u in updates)
        waste = 2 * tokens * ranks * (x.shape[-1] + y.shape[-1])
        scattered = any(isinstance(u.index, tuple) and isinstance(u.index[0], Tensor) for u in updates)
        if len(updates) > 1 and len(dtypes) == 1 and not scattered and waste < _WASTE * len(updates):
            return _side_by_side(y, x.to(dtypes.pop()), updates, kept)
        return _one_by_one(y, x, updates, auto)


def _one_by_one(y: Tensor, x: Tensor, updates: list[Update], auto: torch.dtype | None) -> Tensor:
    """A pair of products for each adapter, in its own dtype (or autocast's)."""
    for u in updates:
        dtype = auto or u.a.dtype
        short = plain_product(x[u.index].reshape(-1, x.shape[-1]).to(dtype), u.a.to(dtype))
        _add(y, u.index, short, u.b.to(dtype), u.scale)
    return y


def _add(y: Tensor, index: Any, short: Tensor, b: Tensor, scale: float) -> None:
    """``y[index] += scale * short b^T``, in place; y [..., out] contiguous, short [n, r], b [out, r]."""
    part = y[index]
    if not part._is_view():  # a copy of scattered rows
        y[index] = part + torch.mm(short, b.t()).mul_(scale).view(part.shape).to(y.dtype)
    else:
        add_product(part.view(-1, part.shape[-1]), short, b, scale)


def _side_by_side(y: Tensor, x: Tensor, updates: list[Update], kept: dict) -> Tensor:
    """All adapters in one pair of products."""
    if not kept:
        kept["a"] = torch.cat([u.a.to(x.dtype) for u in updates])
        kept["b"] = torch.cat([u.b.to(x.dtype).t() for u in updates])
        kept["finite"] = all(bool(torch.isfinite(kept[k]).all()) for k in "ab")
    if not kept["finite"]:  # zero times infinity would reach other adapters' rows
        return _one_by_one(y, x, updates, x.dtype)
    axis = 1 if isinstance(updates[0].index, tuple) else 0
    shares = x.new_zeros(x.shape[axis], kept["a"].shape[0])
    start = 0
    for u in updates:
        shares[u.index[1] if axis else u.index, start : start + u.a.shape[0]] = u.scale
        start += u.a.shape[0]
    short = plain_product(x, kept["a"])
    short = (short.view(len(shares), -1, short.shape[-1]) * shares[:, None]).view(-1, short.shape[-1])
    flat = y.view(-1, y.shape[-1])
    if y.dtype == x.dtype:
        flat.addmm_(short, kept["b"])
    else:
        flat.add_(torch.mm(short, kept["b"]).to(y.dtype))
    return y


class _GroupedLowRank(torch.autograd.Function):
    """As `_LowRank`, for several adapters. Kept: the input, each product with A, and the dropout masks."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, updates: list[Update], *factors: Tensor) -> Tensor:
        own = y._is_view() or not y.is_contiguous()
        made = y.clone(memory_format=torch.contiguous_format) if own else y
        kept: list[Tensor | None] = []
        scales = []
        for update in updates:
            index, a, b = update[:3]
            flat = _working(x[index]).view(-1, x.shape[-1])
            with update.draw():
                mask, factor = _mask(flat, update.p)
            scales.append(update.scale * factor)
            short = plain_product(flat if mask is None else flat * mask, a.to(flat.dtype))
            kept += [short, mask]
            _add(made, index, short, b.to(flat.dtype), scales[-1])
        ctx.save_for_backward(x, *factors, *kept)
        ctx.rest = [u.index for u in updates], scales
        if not own:
            ctx.mark_dirty(y)
        return made

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        indices, scales = ctx.rest
        x, *rest = ctx.saved_tensors
        factors, kept = rest[: 2 * len(indices)], rest[2 * len(indices) :]
        to_x = torch.zeros_like(x, memory_format=torch.contiguous_format) if ctx.needs_input_grad[1] else None
        made: list[Tensor] = []
        for i, (index, scale) in enumerate(zip(indices, scales, strict=True)):
            a, b = factors[2 * i : 2 * i + 2]
            short, mask = kept[2 * i : 2 * i + 2]
            flat = _working(x[index]).view(-1, x.shape[-1])
            outer = gradient[index].reshape(-1, gradient.shape[-1]).to(short.dtype)
            part = None if to_x is None else to_x[index]
            into = part is not None and part._is_view() and part.dtype is flat.dtype
            start = None if part is None else part.view(flat.shape) if into else torch.zeros_like(flat)
            back, *both = _gradients(flat, outer, a, b, short, mask, scale, start)
            made += both
            if to_x is not None and not into:
                to_x[index] = part + back.view(part.shape).to(x.dtype)  # type: ignore[operator, union-attr]
        return gradient, to_x, None, *made
