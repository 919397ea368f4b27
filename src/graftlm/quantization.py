"""Quantised bases: recognising them, dequantising a layer, preparing a base for training. Alone imports bitsandbytes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UnsupportedError


def quantized_kind(layer: Any) -> str | None:
    """ "int8" or "4bit" for bitsandbytes' layers, else None."""
    name = type(getattr(layer, "weight", None)).__name__
    return {"Int8Params": "int8", "Params4bit": "4bit"}.get(name)


def is_quantized(base: nn.Module) -> bool:
    """Whether a model was loaded quantised."""
    return bool(getattr(base, "is_quantized", False)) or any(quantized_kind(m) for m in base.modules())


def dequantize(layer: nn.Module) -> Tensor:
    """A layer's weight in floating point, in the layer's own layout.

    Raises:
        UnsupportedError: a quantisation that is not bitsandbytes'.
    """
    weight: Any = layer.weight
    kind = quantized_kind(layer)
    if kind == "4bit":
        import bitsandbytes.functional as bnb

        return bnb.dequantize_4bit(weight.data, weight.quant_state)
    if kind == "int8":
        state: Any = layer.state
        scale = state.SCB if state.SCB is not None else weight.SCB
        data = weight.data if state.CB is None else state.CB
        return data.to(torch.float32) * (scale.view(-1, 1) / 127.0)
    if not weight.is_floating_point():
        raise UnsupportedError(f"{type(layer).__name__} is quantised by a scheme that GraftLM cannot dequantise.")
    return weight


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """Make a (quantised) base ready for adapter training; HF PEFT's signature.

    Freezes every parameter, casts 16-bit norms to fp32, lets gradients reach the input embeddings' output and switches
    activation checkpointing on. Embeddings and head stay in their dtype (HF PEFT copies them to fp32).
    """
    for parameter in model.parameters():
        parameter.requires_grad = False
    cast: list[tuple[str, int]] = []
    for name, module in model.named_modules():
        if quantized_kind(module) == "4bit" and hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # its packed weights have no backward
        is_norm = isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
        for key, parameter in module.named_parameters(recurse=False) if is_norm else ():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()
                cast.append((f"{name}.{key}", parameter.numel() * 4))
    if cast:
        size = sum(n for _, n in cast)
        print(f"prepare_model_for_kbit_training: {len(cast)} norm tensors to fp32 ({size:,} bytes), such as {cast[0][0]}")
    if use_gradient_checkpointing:
        options = gradient_checkpointing_kwargs or {}
        if options.get("use_reentrant", False):
            model.enable_input_require_grads()
        takes = "gradient_checkpointing_kwargs" in inspect.signature(model.gradient_checkpointing_enable).parameters
        if options and not takes:
            raise UnsupportedError(f"{type(model).__name__} takes no gradient_checkpointing_kwargs; leave them out.")
        model.gradient_checkpointing_enable(**({"gradient_checkpointing_kwargs": options} if options else {}))
    return model
