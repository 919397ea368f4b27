"""Gated MLPs (Llama, Qwen, Gemma, GLM, …) that keep less for the gradient: see `kernels.gated`.

A family's MLP is not known by its name: its own forward, with small stand-ins for its layers, is run beside ours, and must
give the same bits.
"""

from __future__ import annotations

import copy
import functools
import itertools
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


def mlp_forward(module: nn.Module, tried: dict | None = None) -> Callable | None:
    """The fast forward of a gated MLP; None for any other module. `tried` keeps what was found of modules like it."""
    children = {name: child for name, child in module._modules.items() if child is not None}
    names = next((n for n in LAYERS if all(name in children for name in n)), None)
    own = [*module._parameters.values(), *module._buffers.values()]
    if names is None or any(t is not None for t in own):
        return None
    others = {name: child for name, child in children.items() if name not in names}
    active = [(name, plain(type(child))) for name, child in others.items() if not isinstance(child, nn.Dropout)]
    dropout = next((name for name, child in others.items() if isinstance(child, nn.Dropout)), None)
    if len(active) > 1 or (active and active[0][1] not in ACTIVATIONS) or len(others) > 2:
        return None
    tried = {} if tried is None else tried
    settings = [(n, v if isinstance(v, (int, float, str)) else id(v)) for n, v in vars(module).items() if n[0] != "_"]
    key = type(module), names, *active, dropout, *sorted(settings)
    if key not in tried:
        forward = mlp(names, active[0] if active else None, dropout)
        tried[key] = forward if same(module, names, forward) else None
    return tried[key]


def plain(kind: Any) -> Any:
    """The class that a fast one stands for."""
    return getattr(kind, "plain_class", kind)


@functools.cache
def mlp(names: tuple[str, ...], active: tuple[str, type] | None, dropout: str | None) -> Callable:
    """The forward of gated MLPs with these layers. `active`: name and class of the activation's module; None: the MLP calls
    SiLU itself."""
    activation = "silu" if active is None else ACTIVATIONS[active[1]]

    def forward(module: Any, otherwise: Callable, x: Tensor, *more: Any, **named: Any) -> Tensor:
        exchanged = active is not None and plain(type(getattr(module, active[0]))) is not active[1]
        if more or named or exchanged:
            return otherwise(x, *more, **named)
        up = getattr(module, names[1])(x) if len(names) == 3 else None
        made = gated(getattr(module, names[0])(x), up, activation)
        if dropout is not None:
            made = getattr(module, dropout)(made)
        return getattr(module, names[-1])(made)

    return forward


def same(module: nn.Module, names: tuple[str, ...], forward: Callable) -> bool:
    """Whether `forward` computes what this family's MLP does, found with layers of its own kind that are small: in training
    and in evaluation (dropout), for small inputs and large ones (clamps), in fp32 and bf16."""
    probe = copy.copy(module)
    wide = 2 if len(names) == 2 else 1
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        layers = [nn.Linear(8, 6 * wide) for _ in names[:-1]] + [nn.Linear(6, 8)]
        others: dict[str, Any] = {
            n: copy.copy(child) for n, child in module._modules.items() if child is not None and n not in names
        }
        probe._modules = others | dict(zip(names, layers, strict=True))
        cases = itertools.product((torch.float32, torch.bfloat16), (1.0, 1e4), (True, False))
        for dtype, size, training in cases:
            for part in (*layers, *others.values()):
                part.training = training
            probe.training = training
            for layer in layers:
                layer.to(dtype)
            x = (torch.randn(3, 8) * size).to(dtype)
            made = []
            for run in (functools.partial(plain(type(module)).forward, probe), functools.partial(forward, probe, None)):
                torch.manual_seed(1)
                try:
                    made.append(run(x))
                except Exception:  # a forward that wants more than its input
                    return False
            if made[0].dtype is not made[1].dtype or not torch.equal(*made):
                return False
    return True
