"""Liger's Triton kernels for GPUs (pip install liger-kernel; arXiv:2410.10989), where they are installed and faster.

Each stands beside a function of ours and is taken for tensors of a kind (device, dtype, width) after both have run on random
ones: it must give the same, up to rounding, in less time, forward and backward. Else, and where no gradient is asked for,
ours is used.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .order import first_order
from .timing import time_ratio

log = logging.getLogger("graftlm.kernels")

ROWS = 4096


@functools.cache
def operations(name: str) -> Any:
    """The module `liger_kernel.ops.<name>`; None where it is not installed, or does not go with this torch or Triton."""
    try:
        return import_module(f"liger_kernel.ops.{name}")
    except Exception as error:  # Triton fails in many ways where it has no device
        if not isinstance(error, ModuleNotFoundError):
            log.info("liger-kernel is left out: %s", error)
        return None


def runs_on(x: Tensor) -> bool:
    """Whether tensors like this are Triton's to compute."""
    return x.is_cuda


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, one_more: bool) -> Tensor:
    """As `norm.rms_norm`; the gradient's memory is not reused, since others may read it."""
    offset, mode = (1.0, "gemma") if one_more else (0.0, "llama")
    with torch.cuda.device_of(x):
        return Once.apply(operations("rms_norm").LigerRMSNormFunction.apply(x, weight, epsilon, offset, mode, False))


class Once(torch.autograd.Function):
    """x as it is, which may not be differentiated twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


class SwiGLU(torch.autograd.Function):
    """As `gated.gated` with silu. (Liger's own writes into what it kept: a graph could not be gone through twice.)"""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        with torch.cuda.device_of(gate):
            return operations("swiglu").swiglu_forward(gate, up)[-1]

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up = (t.clone() for t in ctx.saved_tensors)
        with torch.cuda.device_of(gate):
            return operations("swiglu").swiglu_backward(gate, up, gradient.contiguous())


_WINS: dict[tuple, bool] = {}


def wins(
    name: str, x: Tensor, theirs: Callable[..., Tensor], ours: Callable[..., Tensor], inputs: int = 1, mode: Any = None
) -> bool:
    """Whether Liger's `theirs` is used for x [..., W] in the place of `ours`, both functions of `inputs` tensors [N, W].
    `mode`: whatever else they depend on."""
    if not runs_on(x) or operations(name) is None:
        return False
    key = name, mode, x.device, x.dtype, x.shape[-1]
    if key not in _WINS:
        generator = torch.Generator().manual_seed(0)
        given = [torch.randn(ROWS, x.shape[-1], generator=generator).to(x) for _ in range(inputs)]
        try:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):  # not those of checkpointing around it
                _WINS[key] = alike(theirs, ours, given) and faster(theirs, ours, given)
        except Exception as error:  # a version of Liger with other arguments, a width that Triton refuses
            log.info("liger-kernel's %s is left out: %s", name, error)
            _WINS[key] = False
    return _WINS[key]


def alike(theirs: Callable[..., Tensor], ours: Callable[..., Tensor], given: list[Tensor]) -> bool:
    """Whether both give the same, and the same gradients, up to a few roundings."""
    share = 1e-4 if given[0].dtype is torch.float32 else 2e-2
    pairs = zip(both_ways(theirs, given), both_ways(ours, given), strict=True)
    return all(float((a - b).float().norm()) <= share * float(b.float().norm()) for a, b in pairs)


def both_ways(function: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
    """A function's value and its gradients."""
    tensors = [t.detach().requires_grad_() for t in given]
    with torch.enable_grad():
        made = function(*tensors)
        return [made.detach(), *torch.autograd.grad(made, tensors, made.detach())]


def faster(theirs: Callable[..., Tensor], ours: Callable[..., Tensor], given: list[Tensor]) -> bool:
    """Whether `theirs` takes less time, forward and backward."""
    return time_ratio(lambda: both_ways(theirs, given), lambda: both_ways(ours, given), given[0]) < 1
