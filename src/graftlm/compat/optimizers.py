"""HF PEFT's `peft.optimizers`: optimizers over an adapter's parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..layers import Adapted


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: Callable[..., Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_lr_embedding: float = 1e-6,
    loraplus_weight_decay: float = 0.0,
    **kwargs: Any,
) -> Optimizer:
    """LoRA+ (Hayou et al. 2024, arXiv:2402.12354): B learns faster than A, `lr_B = loraplus_lr_ratio * lr_A`.

    Args:
        model: a wrapper, or any module; its parameters that require gradients are trained.
        optimizer_cls: of torch's signature, called with four groups: A and what else there is; LoRA of embeddings; B;
            vectors (biases and norms), which train like B without weight decay.
        lr: of the first group.
        loraplus_lr_embedding: of LoRA of embeddings.
        loraplus_weight_decay: of all groups but the last.
        kwargs: for the optimizer.
    """
    embedded = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, Adapted) and module.frozen.kind == "embedding"
        for _, parameter in module.held_by()
    }
    main: list[nn.Parameter] = []
    embeddings: list[nn.Parameter] = []
    fast: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in embedded:
            group = embeddings
        elif parameter.dim() == 1:
            group = vectors
        else:
            group = fast if "lora_B" in name else main
        group.append(parameter)
    rates = (lr, loraplus_lr_embedding, lr * loraplus_lr_ratio, lr * loraplus_lr_ratio)
    decays = (loraplus_weight_decay,) * 3 + (0.0,)
    groups = [
        {"params": found, "lr": rate, "weight_decay": decay}
        for found, rate, decay in zip((main, embeddings, fast, vectors), rates, decays, strict=True)
    ]
    return optimizer_cls(groups, lr=lr, **kwargs)
