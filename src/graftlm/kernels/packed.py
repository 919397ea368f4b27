"""Frozen weights kept a second and third time, in the form that the processor multiplies by fastest (see `blocks`).

A library brings a weight into a layout of its own at every product: with few rows, that takes as long as the product. Where
the memory is there, the form is kept, one for ``x W^T`` and one for the gradient's ``g W``. Nothing tells when somebody
writes into a weight past autograd (`weight.data`), so this holds within a block of code only (`packed_weights`), in which
nobody does.

Shapes: x [..., in], W [out, in], g [..., out].
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .blocks import DTYPES, Form, form
from .linear import owned
from .order import first_order

_KEPT: Any = WeakIdKeyDictionary()  # weights, and their forms
_openings = [0]  # how often somebody began or ended to keep some


class Packed:
    """The forms of one weight, made when they are first needed."""

    def __init__(self, weight: Tensor, transposed: bool) -> None:
        self.transposed = transposed
        self.users = 0
        self.made = self.state(weight)
        self.forms: dict[bool, Form] = {}

    @staticmethod
    def state(weight: Tensor) -> tuple:
        return weight.data_ptr(), weight._version, weight.dtype

    def of(self, weight: Tensor, backward: bool) -> Form:
        """The form for a forward or backward product."""
        if self.state(weight) != self.made:
            self.forms.clear()
            self.made = self.state(weight)
        if backward not in self.forms:
            self.forms[backward] = form(weight.detach().t() if self.transposed != backward else weight.detach())
        return self.forms[backward]


@contextmanager
def packed_weights(weights: Iterable[tuple[Tensor, bool]]) -> Iterator[None]:
    """Within the block, keep forms of these weights on a CPU: each with whether it lies [in, out]."""
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
    """Whether forms of this weight are kept."""
    return weight in _KEPT


def packed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Packed | None:
    """What is kept of `weight`, if a product with x can use it."""
    if not _KEPT or (kept := _KEPT.get(weight)) is None:
        return None
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    usable = x.dtype is weight.dtype and x.dtype in DTYPES and weight.device.type == "cpu" and x.numel()
    usable = usable and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
    return kept if usable and not trained else None


def packed_product(x: Tensor, kept: Packed, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b``; the gradient goes to x."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _PackedProduct.apply(x, kept, weight, bias)
    return kept.of(weight, backward=False)(x, bias)


class _PackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Packed, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.kept = kept
        return owned(kept.of(weight, backward=False)(x, bias))

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return ctx.kept.of(ctx.saved_tensors[0], backward=True)(gradient.contiguous(), None), None, None, None


class Joint:
    """The form of several weights that multiply the same x, one below the other; only while each is kept.

    It stands in place of the weights' own forward ones, which a pass by itself makes again."""

    def __init__(self) -> None:
        self._weights: list[Tensor] = []
        self._kept: list[Packed] = []
        self._made: list[tuple] = []
        self._form: Form | None = None

    def of(self, weights: list[Tensor]) -> Form | None:
        """The form of weights as they stand now; None where not all are kept."""
        same = len(self._weights) == len(weights) and all(map(operator.is_, self._weights, weights))
        if not same or not all(kept.users for kept in self._kept):
            self._weights, self._kept, self._form = [], [], None
            if not all(weight in _KEPT for weight in weights):
                return None
            self._weights, self._kept = weights, [_KEPT[weight] for weight in weights]
        if len(weights) == 1:
            return self._kept[0].of(weights[0], backward=False)
        now = [Packed.state(weight) for weight in weights]
        if self._form is None or now != self._made:
            oriented = zip(self._weights, self._kept, strict=True)
            joined = torch.cat([w.detach().t() if kept.transposed else w.detach() for w, kept in oriented])
            self._form, self._made = form(joined), now
            for kept in self._kept:
                kept.forms.pop(False, None)
        return self._form
