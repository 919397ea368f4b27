"""A frozen weight as a processor's library multiplies by it fastest: in oneDNN's blocks, or in 16 bits.

With few rows a product takes as long as its weight takes to come from memory. Weights that were published in 16 bits, as
most are, are half as large in fp16; FBGEMM widens them in the processor's registers and multiplies rows of fp32 by them in
fp32: the fp32 product of the same values, up to the order of its sum. A weight is kept so only where each of its values is a
number of fp16, and where that is faster on this processor.

Shapes: x [..., in], W [out, in], b [out].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .linear import onednn_multiplies, way_for
from .timing import shortest_times

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LAID_OUT_FOR = 64  # rows; products of any number of rows take the blocks
_TILE = 2**22  # entries that are looked at at a time
_ROWS = (1, 8, 64)  # that forms are compared for
_CLEAR_WIN = 0.95
_SIZE, _COLD = 1024, 8  # of weights that are multiplied by in turn: in a model each comes from memory, not from a cache


class Form:
    """One weight [out, in], as it was when this was made. Without a gradient.

    Attributes:
        dtype: of the weight, of the rows that it multiplies and of what is made of them.
    """

    def __init__(self, weight: Tensor) -> None:
        self.dtype = weight.dtype

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x W^T + b``, in memory of its own."""
        raise NotImplementedError


class Plain(Form):
    """As it lies."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.weight = weight.detach()

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return way_for(x, self.weight)(x, self.weight, bias)


class Blocks(Form):
    """In oneDNN's layout."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.blocks = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _LAID_OUT_FOR)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return _onednn()(x, self.blocks, bias, "none", [], "")


class Halves(Form):
    """In fp16, in FBGEMM's layout."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.kept: Any = torch.ops.quantized.linear_prepack_fp16(weight.detach().float().contiguous(), None)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = _fbgemm()(x.float(), self.kept)
        if bias is not None:
            y += bias
        return y.to(self.dtype)


def form(weight: Tensor) -> Form:
    """The fastest form of a weight on a CPU."""
    if fits_halves(weight):
        return Halves(weight)
    return Blocks(weight) if onednn_multiplies(weight.dtype) else Plain(weight)


def fits_halves(weight: Tensor) -> bool:
    """Whether fp16 holds every value of a weight, and products by it are the faster for it here."""
    return weight.dtype in DTYPES and halves_win(weight.dtype) and _exact(weight.detach())


def _exact(weight: Tensor) -> bool:
    lying = weight if weight.is_contiguous() else weight.t()
    largest = torch.finfo(torch.float16).max
    parts = lying.reshape(-1).split(_TILE)
    return all(torch.equal(p.half().to(p.dtype), p) and p.abs().amax().item() <= largest for p in parts if p.numel())


@functools.cache
def halves_win(dtype: torch.dtype) -> bool:
    """Whether products by weights in 16 bits are faster than the others, for few rows and for many; measured once a process
    (some hundred milliseconds)."""
    if not _multiplies_halves():
        return False
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        weights = [torch.ones(_SIZE, _SIZE, dtype=dtype) for _ in range(_COLD)]
        other = Blocks if onednn_multiplies(dtype) else Plain
        forms = [Halves(weight) for weight in weights], [other(weight) for weight in weights]
        ratios = [_ratio(torch.ones(rows, _SIZE, dtype=dtype), *forms) for rows in _ROWS]
    return math.prod(ratios) ** (1 / len(ratios)) < _CLEAR_WIN


def _ratio(x: Tensor, first: Sequence[Form], second: Sequence[Form]) -> float:
    """The time of products by the first forms over that by the second ones."""
    one, other = shortest_times([lambda: [w(x, None) for w in first], lambda: [w(x, None) for w in second]], x)
    return one / other


@functools.cache
def _multiplies_halves() -> bool:
    """Whether this torch and this processor have FBGEMM's products."""
    try:
        Halves(torch.ones(16, 16))(torch.ones(1, 16), None)
    except (RuntimeError, AttributeError):  # another engine of torch's, a processor without the instructions
        return False
    return True


@functools.cache
def _onednn() -> Any:
    return torch.ops.mkldnn._linear_pointwise.default


@functools.cache
def _fbgemm() -> Any:
    return torch.ops.quantized.linear_dynamic_fp16.default
