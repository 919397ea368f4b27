"""A gated activation that keeps its two inputs only: ``act(gate) * up`` (GLU variants, arXiv:2002.05202).

torch keeps ``act(gate)`` as well, a third of what such an MLP keeps; here the backward pass makes it again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import liger
from .order import first_order

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def gated(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """``act(gate) * up``, [..., I].

    Args:
        gate: [..., I], or [..., 2 I] with the values that it gates in its second half.
        up: [..., I]; None where `gate` holds both.
        activation: of `ACTIVATIONS`.
    """
    usable = activation == "silu" and up is not None and liger.runs_on(gate) and torch.is_grad_enabled()
    if usable and liger.wins("swiglu", gate, liger.SwiGLU.apply, lambda *given: _Gated.apply(*given, "silu"), inputs=2):
        return liger.SwiGLU.apply(gate, up)
    return _Gated.apply(gate, up, activation)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        halves = gate.chunk(2, -1) if up is None else (gate, up)
        return _active(halves[0], activation).mul_(halves[1])

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        if up is not None:
            to_up = _active(gate, ctx.activation).mul_(gradient)
            return _slope(up * gradient, gate, ctx.activation), to_up, None
        both = torch.empty_like(gate, memory_format=torch.contiguous_format)
        (gate, up), (to_gate, to_up) = gate.chunk(2, -1), both.chunk(2, -1)
        torch.mul(_active(gate, ctx.activation), gradient, out=to_up)
        to_gate.copy_(_slope(up * gradient, gate, ctx.activation))
        return both, None, None


def _active(gate: Tensor, activation: str) -> Tensor:
    """A new tensor."""
    if activation == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def _slope(gradient: Tensor, gate: Tensor, activation: str) -> Tensor:
    """The activation's derivative at `gate`, times `gradient`."""
    if activation == "silu":
        return torch.ops.aten.silu_backward(gradient, gate)
    return torch.ops.aten.gelu_backward(gradient, gate, approximate="tanh" if activation == "gelu_tanh" else "none")
