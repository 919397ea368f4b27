"""Gated MLPs (Llama, Qwen, Gemma, GLM, …) that keep less for the gradient: see `kernels.gated`.

A family's MLP is not known by its name: its own forward, with small stand-ins for its layers, is run beside ours, and must
give the same bits.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import activations as a

from ..kernels.gated import gated

# Layers of a gated MLP: (gate, up, down), or (gate and up in one, down).
LAYERS = [
    ("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj"), ("w1", "w3", "w2"),
    ("dense_h_to_4h", "dense_4h_to_h"),
]  # fmt: skip
ACTIVATIONS = {nn.SiLU: "silu", a.SiLUActivation: "silu", a.GELUActivation: "gelu", a.GELUTanh: "gelu_tanh"}

_TRIED: dict[tuple, Callable | None] = {}


def mlp_forward(module: nn.Module) -> Callable | None:
    """The fast forward of a gated MLP; None for any other module."""
    children = module._modules
    names = next((n for n in LAYERS if all(name in children for name in n)), None)
    if names is None:
        return None
    others = {name: child for name, child in children.items() if name not in names and child is not None}
    active = [ACTIVATIONS.get(plain(type(child)), "") for child in others.values() if not isinstance(child, nn.Dropout)]
    dropout = next((name for name, child in others.items() if isinstance(child, nn.Dropout)), None)
    if len(active) > 1 or (active and not active[0]) or len(others) > 2:
        return None
    key = type(module), names, *active, dropout
    if key not in _TRIED:
        forward = mlp(names, active[0] if active else "silu", dropout)
        _TRIED[key] = forward if same(module, names, forward) else None
    return _TRIED[key]


def plain(kind: Any) -> Any:
    """The class that a fast one stands for."""
    return getattr(kind, "plain_class", kind)


@functools.cache
def mlp(names: tuple[str, ...], activation: str, dropout: str | None) -> Callable:
    """The forward of gated MLPs with these layers."""

    def forward(module: Any, otherwise: Callable, x: Tensor, *more: Any, **named: Any) -> Tensor:
        if more or named:
            return otherwise(x, *more, **named)
        up = getattr(module, names[1])(x) if len(names) == 3 else None
        made = gated(getattr(module, names[0])(x), up, activation)
        if dropout is not None:
            made = getattr(module, dropout)(made)
        return getattr(module, names[-1])(made)

    return forward


def same(module: nn.Module, names: tuple[str, ...], forward: Callable) -> bool:
    """Whether `forward` computes what this family's MLP does, found with layers of its own kind that are small."""
    probe = copy.copy(module)
    wide = 2 if len(names) == 2 else 1
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        layers = [nn.Linear(8, 6 * wide) for _ in names[:-1]] + [nn.Linear(6, 8)]
        probe._modules = module._modules | dict(zip(names, layers, strict=True))
        for dtype in (torch.float32, torch.bfloat16):
            for layer in layers:
                layer.to(dtype)
            x = torch.randn(3, 8).to(dtype)
            made = []
            for run in (functools.partial(plain(type(module)).forward, probe), functools.partial(forward, probe, None)):
                torch.manual_seed(1)
                try:
                    made.append(run(x))
                except Exception:  # noqa: BLE001 - a forward that wants more than its input
                    return False
            if made[0].dtype is not made[1].dtype or not torch.equal(*made):
                return False
    return True
