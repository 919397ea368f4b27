"""RMSNorm (arXiv:1910.07467) that keeps little: ``y = w * x / sqrt(mean(x^2) + eps)``, x [..., H], w [H].

transformers' own keeps four tensors in fp32 for the gradient; in bf16 these are most of what a Llama layer keeps. Here it
is x (which the residual stream keeps anyway) and one number a token. Results equal transformers' bit for bit.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import liger
from .order import first_order


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, one_more: bool) -> Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, inverse)
        ctx.one_more = one_more
        if one_more:
            return (wide * inverse * (1.0 + weight.float())).to(x.dtype)
        return weight * (wide * inverse).to(x.dtype)

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        to_unit = gradient.float() * (1.0 + weight.float() if ctx.one_more else weight.float())
        unit = x.float() * inverse
        share = (to_unit * unit).mean(-1, keepdim=True)
        return to_unit.addcmul_(unit, share, value=-1).mul_(inverse).to(x.dtype), None, None, None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, one_more: bool = False) -> Tensor:
    """The norm of x [..., H] by a frozen weight [H]; with `one_more` the weight is a difference to one."""
    if liger.runs_on(x) and torch.is_grad_enabled():
        theirs = functools.partial(liger.rms_norm, weight=weight, epsilon=epsilon, one_more=one_more)
        if liger.wins("rms_norm", x, theirs, lambda x: _RMSNorm.apply(x, weight, epsilon, one_more), mode=one_more):
            return theirs(x)
    return _RMSNorm.apply(x, weight, epsilon, one_more)
