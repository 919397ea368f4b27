"""Frozen weights kept a second and third time, in the layout that oneDNN multiplies by fastest.

oneDNN brings a weight into blocks of its own at every product: with few rows, that takes as long as the product. Where the
memory is there, the blocks are kept, one set for ``x W^T`` and one for the gradient's ``g W``. Nothing tells when somebody
writes into a weight past autograd (`weight.data`), so this holds within a block of code only (`packed_weights`), in which
nobody does.

Shapes: x [..., in], W [out, in], g [..., out].
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .order import first_order

_DTYPES = (torch.float32, torch.bfloat16)
_ROWS = 64  # that the blocks are laid out for; products of any number of rows take them
_KEPT: Any = WeakIdKeyDictionary()  # weights, and their blocks
_openings = [0]  # how often somebody began or ended to keep some


class Packed:
    """The blocks of one weight, made when they are first needed."""

    def __init__(self, weight: Tensor, transposed: bool) -> None:
        self.transposed = transposed
        self.users = 0
        self.made = self.state(weight)
        self.blocks: dict[bool, Tensor] = {}

    @staticmethod
    def state(weight: Tensor) -> tuple:
        return weight.data_ptr(), weight._version, weight.dtype

    def of(self, weight: Tensor, backward: bool) -> Tensor:
        """The blocks for a forward or backward product."""
        if self.state(weight) != self.made:
            self.blocks.clear()
            self.made = self.state(weight)
        if backward not in self.blocks:
            plain = weight.detach()
            plain = plain.t() if self.transposed != backward else plain
            self.blocks[backward] = torch.ops.mkldnn._reorder_linear_weight(plain.contiguous(), _ROWS)
        return self.blocks[backward]


@contextmanager
def packed_weights(weights: Iterable[tuple[Tensor, bool]]) -> Iterator[None]:
    """Within the block, keep blocks of these weights on a CPU: each with whether it lies [in, out]."""
    held = []
    _openings[0] += 1
    for weight, transposed in weights:
        if weight not in _KEPT:
            _KEPT[weight] = Packed(weight, transposed)
        held.append(weight)
        _KEPT[weight].users += 1
    try:
        yield
    finally:
        _openings[0] += 1
        for weight in held:
            _KEPT[weight].users -= 1
            if not _KEPT[weight].users:
                del _KEPT[weight]


def openings() -> int:
    """A number that is another one whenever other weights may be kept."""
    return _openings[0]


def is_kept(weight: Tensor) -> bool:
    """Whether blocks of this weight are kept."""
    return weight in _KEPT


def packed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Packed | None:
    """What is kept of `weight`, if a product with x can use it."""
    if not _KEPT or (kept := _KEPT.get(weight)) is None:
        return None
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    usable = x.dtype is weight.dtype and x.dtype in _DTYPES and weight.device.type == "cpu" and x.numel()
    usable = usable and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
    return kept if usable and not trained else None


def packed_product(x: Tensor, kept: Packed, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b``; the gradient goes to x."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _PackedProduct.apply(x, kept, weight, bias)
    return block_product(x, kept.of(weight, backward=False), bias)


class _PackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Packed, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.kept = kept
        return block_product(x, kept.of(weight, backward=False), bias)

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return block_product(gradient.contiguous(), ctx.kept.of(ctx.saved_tensors[0], backward=True), None), None, None, None


def block_product(x: Tensor, blocks: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b`` without a gradient, by the blocks of W."""
    return _linear()(x, blocks, bias, "none", [], "")


@functools.cache
def _linear() -> Any:
    return torch.ops.mkldnn._linear_pointwise.default


class Joint:
    """The blocks of several weights that multiply the same x, one below the other; only while each is kept.

    They stand in place of the weights' own forward ones, which a pass by itself makes again."""

    def __init__(self) -> None:
        self._weights: list[Tensor] = []
        self._kept: list[Packed] = []
        self._made: list[tuple] = []
        self._blocks: Tensor | None = None

    def of(self, weights: list[Tensor]) -> Tensor | None:
        """The blocks of weights as they stand now; None where not all are kept."""
        same = len(self._weights) == len(weights) and all(map(operator.is_, self._weights, weights))
        if not same or not all(kept.users for kept in self._kept):
            self._weights, self._kept, self._blocks = [], [], None
            if not all(weight in _KEPT for weight in weights):
                return None
            self._weights, self._kept = weights, [_KEPT[weight] for weight in weights]
        if len(weights) == 1:
            return self._kept[0].of(weights[0], backward=False)
        now = [Packed.state(weight) for weight in weights]
        if self._blocks is None or now != self._made:
            oriented = zip(self._weights, self._kept, strict=True)
            joined = torch.cat([w.detach().t() if kept.transposed else w.detach() for w, kept in oriented])
            self._blocks, self._made = torch.ops.mkldnn._reorder_linear_weight(joined, _ROWS), now
            for kept in self._kept:
                kept.blocks.pop(False, None)
        return self._blocks
