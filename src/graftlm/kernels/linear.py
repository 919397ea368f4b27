"""Linear layers on CPUs by oneDNN, where this machine does that faster than torch's default library.

For fp32 torch hands products to MKL, which on some processors is less than half as fast as oneDNN; on others it is the
other way round. So the two are timed once a process and dtype, and only a clear win changes anything.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .order import first_order
from .timing import time_ratio

_CLEAR_WIN = 0.8  # of the default's time; nearer to 1 two runs of one script might choose differently
_SMALL = 2**19  # multiplications under which choosing costs more than it brings


MULTIPLE = 16  # of rows: products of odd sizes run at little more than half the speed
_FEW = 64


def even_rows(count: int) -> int:
    """How many rows to add to `count` so that products with them run at full speed."""
    return -count % MULTIPLE if count >= _FEW else 0


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``: x [..., in], weight [out, in], bias [out] -> [..., out]. The gradient goes where it is required."""
    if _takes(x, weight) and onednn_wins(x.dtype):
        return _Product.apply(x, weight, bias) if torch.is_grad_enabled() else _onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def plain_product(x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T`` without a gradient, x [N, in], weight [out, in] of any strides."""
    if _takes(x, weight) and onednn_wins(x.dtype):
        return _onednn(x, weight, None)
    return F.linear(x, weight)


def add_product(y: Tensor, x: Tensor, weight: Tensor, scale: float) -> None:
    """``y += scale * x W^T`` in place, without a gradient; y [N, out], x [N, in], weight [out, in]."""
    if _takes(x, weight) and onednn_wins(x.dtype):
        y.add_(_onednn(x, weight, None), alpha=scale)
    else:
        y.addmm_(x, weight.t(), alpha=scale)


def _takes(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype is weight.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.numel() * weight.shape[0] >= _SMALL
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and type(weight) in (Tensor, torch.nn.Parameter)
    )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        to_x = _onednn(gradient, weight.t(), None) if ctx.needs_input_grad[0] else None
        flat = gradient.view(-1, gradient.shape[-1])
        to_weight = to_bias = None
        if ctx.needs_input_grad[1]:
            to_weight = _onednn(flat.t(), x.reshape(-1, x.shape[-1]).t(), None)
        if ctx.needs_input_grad[2]:
            to_bias = flat.sum(0)
        return to_x, to_weight, to_bias


@functools.cache
def onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether this torch and this processor have oneDNN's products of a dtype."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        _onednn(torch.ones(16, 16, dtype=dtype), torch.ones(16, 16, dtype=dtype), None)
    except RuntimeError:  # a processor without the instructions
        return False
    return True


@functools.cache
def onednn_wins(dtype: torch.dtype) -> bool:
    """Whether oneDNN is clearly faster here for a product and its gradient; measured once (some ten milliseconds)."""
    if not onednn_multiplies(dtype):
        return False
    with torch.no_grad():
        x, weight = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        onednn = lambda: (_onednn(x, weight, None), _onednn(x, weight.t(), None))  # noqa: E731
        return time_ratio(onednn, lambda: (F.linear(x, weight), x @ weight), x) < _CLEAR_WIN
