"""Linear layers on CPUs in the way that is the fastest there.

* torch hands fp32 products to MKL, whose way to divide them among threads is a bad one on some processors (see `mkl`);
  oneDNN is faster still on some, above all for few rows, and slower on others.
* Processors without instructions for 16-bit products multiply such values in a scalar loop, a hundred times slower where a
  factor is transposed, as in every backward pass. There the values are brought to fp32, a tile of the weight at a time in a
  buffer that is kept, and multiplied in fp32; the result equals the fp32 product of the same values, rounded once.

The ways are timed once a process for each dtype, orientation of the weight and order of magnitude of the rows, and only a
clear win over torch's default changes anything.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .mkl import striped, takes_stripes
from .order import first_order
from .timing import fastest

_CLEAR_WIN = 0.9  # of the default's time; nearer to 1 two runs of one script might choose differently
_COLD = 8  # weights that are multiplied by in turn when ways are timed: in a model each comes from memory, not from a cache
_SMALL = {torch.float32: 2**19, torch.bfloat16: 2**14, torch.float16: 2**14}  # multiplications not worth a choice
CHOSEN = tuple(_SMALL)  # dtypes for which there is a choice
_BUFFER = 2**22  # elements of a weight that are in fp32 at a time

MULTIPLE = 16  # of rows: products of odd sizes run at little more than half the speed
_FEW, _MANY = 64, 128
MAGNITUDES = (1, 4, 16, _FEW, _MANY)  # numbers of rows that ways are timed for; of 16-bit products up to _FEW

Way = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def even_rows(count: int) -> int:
    """How many rows to add to `count` so that products with them run at full speed."""
    return -count % MULTIPLE if count >= _FEW else 0


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``: x [..., in], weight [out, in], bias [out] -> [..., out]. The gradient goes where it is required."""
    forward, backward = way_for(x, weight), way_for(x, weight, backward=True)
    if torch.is_grad_enabled() and (forward is not F.linear or backward is not F.linear):
        return _Product.apply(x, weight, bias, forward, backward)
    return forward(x, weight, bias)


def plain_product(x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T`` without a gradient, x [N, in], weight [out, in] of any strides."""
    return way_for(x, weight)(x, weight, None)


def add_product(y: Tensor, x: Tensor, weight: Tensor, scale: float) -> None:
    """``y += scale * x W^T`` in place, without a gradient; y [N, out], x [N, in], weight [out, in].

    x and weight may be of a wider dtype than y, in which the product is then made.
    """
    # x and W are narrow: in fp32 torch's own product is the faster by far
    way = F.linear if x.dtype is torch.float32 else way_for(x, weight)
    if way is F.linear and y.dtype is x.dtype:
        y.addmm_(x, weight.t(), alpha=scale)
    else:
        y.add_(way(x, weight, None).to(y.dtype), alpha=scale)


def working_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which to make products of values in `dtype`: fp32 for 16-bit ones on CPUs that multiply them slowly."""
    narrow = device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and not torch.compiler.is_compiling()
    return torch.float32 if narrow and way(dtype, _FEW, True) is widened else dtype


def frozen_ways(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Way, Way] | None:
    """How to multiply x [..., in] by a frozen weight and a gradient by its transpose, where one kind of number will do for
    both on this processor; None where nobody may choose (other devices, autocast, compiling, trained weights)."""
    free = x.device.type == "cpu" and x.dtype is weight.dtype and type(weight) in (Tensor, torch.nn.Parameter)
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if not free or trained or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return None
    if x.dtype not in CHOSEN or working_dtype(x.dtype, x.device) is not x.dtype:
        return None
    return way_for(x, weight), way_for(x, weight, backward=True)


# -- which way -----------------------------------------------------------------------------------------------------------
def way_for(x: Tensor, weight: Tensor, backward: bool = False) -> Way:
    """How to multiply x [..., in] by weight [out, in], or (`backward`) a gradient [..., out] by the weight."""
    out, size = weight.shape
    rows = x.numel() // size if size else 0
    if (
        x.device.type != "cpu"
        or x.dtype is not weight.dtype
        or rows * out * size < _SMALL.get(x.dtype, rows * out * size + 1)
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or type(weight) not in (Tensor, torch.nn.Parameter)
    ):
        return F.linear
    transposed = weight.stride(0) == 1 and out > 1
    most = _MANY if x.dtype is torch.float32 else _FEW  # of 16-bit products many rows tell no more, and may take seconds
    return way(x.dtype, min(_magnitude(rows), most), transposed != backward)


def _magnitude(rows: int) -> int:
    """The nearest of `MAGNITUDES`. (Of more rows than the last, MKL cuts well by itself, too.)"""
    return 1 if rows == 1 else next((m for m, below in ((4, 8), (16, 32), (_FEW, 96)) if rows < below), _MANY)


@functools.cache
def way(dtype: torch.dtype, rows: int, transposed: bool) -> Way:
    """The fastest way here for products of `rows` rows, the weight lying [out, in] or (`transposed`) [in, out]; measured
    once (some ten milliseconds)."""
    ways: list[Way] = [F.linear]
    ways += [striped] * (dtype is torch.float32 and takes_stripes())
    ways += [onednn] * onednn_multiplies(dtype)
    ways += [widened] * (dtype is not torch.float32)
    if len(ways) == 1:
        return F.linear
    size, count = timed_weights(dtype)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        x = torch.ones(rows, size, dtype=dtype)
        weights = [torch.ones(size, size, dtype=dtype) for _ in range(count)]
        weights = [w.t() for w in weights] if transposed else weights
        return ways[fastest([functools.partial(_each, way, x, weights) for way in ways], x, _CLEAR_WIN)]


def timed_weights(dtype: torch.dtype) -> tuple[int, int]:
    """Width and number of the square weights on which ways are timed."""
    return (1024, _COLD) if dtype is torch.float32 else (512, 1)


def _each(way: Way, x: Tensor, weights: list[Tensor]) -> None:
    for weight in weights:
        way(x, weight, None)


@functools.cache
def onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether this torch and this processor have oneDNN's products of a dtype."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        onednn(torch.ones(16, 16, dtype=dtype), torch.ones(16, 16, dtype=dtype), None)
    except RuntimeError:  # a processor without the instructions
        return False
    return True


# -- the ways ------------------------------------------------------------------------------------------------------------
def onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """By oneDNN."""
    return owned(torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))


def owned(y: Tensor) -> Tensor:
    """The tensor as no view of another one: what an autograd function hands out may then be written into."""
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y


_kept = threading.local()


def widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In fp32, the weight brought there tile by tile."""
    out, size = weight.shape
    flat = x.reshape(-1, size).float()
    bias = None if bias is None else bias.float()
    tile = max(1, _BUFFER // max(size, 1))
    if out <= tile:
        return owned(_wide_product(flat, weight, bias).to(x.dtype).view(*x.shape[:-1], out))
    y = x.new_empty(len(flat), out)
    for start in range(0, out, tile):
        part = slice(start, start + tile)
        y[:, part] = _wide_product(flat, weight[part], None if bias is None else bias[part])
    return owned(y.view(*x.shape[:-1], out))


def _wide_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x in fp32, weight a tile in 16 bits."""
    wide = in_fp32(weight)
    return way_for(x, wide)(x, wide, bias)


def in_fp32(weight: Tensor) -> Tensor:
    """A weight [out, in] in fp32 in this thread's buffer, lying as it lies: valid until the next call."""
    count = weight.numel()
    buffer = getattr(_kept, "buffer", None)
    if buffer is None or len(buffer) < count:
        with torch.inference_mode(False):  # such a tensor could not be written into later
            buffer = _kept.buffer = torch.empty(max(count, min(2 * count, _BUFFER)), dtype=torch.float32)
    shape = weight.shape
    wide = buffer[:count].view(shape[1], shape[0]).t() if weight.stride(0) == 1 else buffer[:count].view(shape)
    return wide.copy_(weight.detach())


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, way: Way, back: Way) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.back = back
        return owned(way(x, weight, bias))

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        to_x = ctx.back(gradient, weight.t(), None) if ctx.needs_input_grad[0] else None
        flat = gradient.view(-1, gradient.shape[-1])
        to_weight = to_bias = None
        if ctx.needs_input_grad[1]:
            to_weight = plain_product(flat.t(), x.reshape(-1, x.shape[-1]).t())
        if ctx.needs_input_grad[2]:
            to_bias = flat.sum(0)
        return to_x, to_weight, to_bias, None, None
