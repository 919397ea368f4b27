"""`prepare_model_for_kbit_training`: a (quantised) base made ready for adapter training.

HF PEFT copies every 16-bit tensor to fp32: embeddings, head, norms; the activations then run in fp32 as well, and QLoRA
needs more memory than LoRA on the bf16 model. Here only what training needs is cast, each cast is printed with its bytes:

* norms: weights in fp32, input and output in the dtype of the activations;
* the head: its product in fp32, tile by tile over the vocabulary; its weight (often the embeddings') stays as it is;
* float16 on a CPU, where there is no gradient scaling: everything that is not packed becomes fp32.

What a quantised model on a CPU still reads from its checkpoint's mapped file (embeddings, head) is copied out, so that the
whole unquantised checkpoint does not stay in memory beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .architectures import base_modules, innermost
from .quantization import is_quantized, quantized_kind, quantized_layers, settle, unpacked_parameters

HALF = (torch.float16, torch.bfloat16)
FEW = 32  # tokens that decoding hands to the head at a time
TILE = 2**24  # elements of the head's weight that are held in fp32 at a time


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freeze a base, cast what training needs, switch activation checkpointing on. HF PEFT's signature.

    Args:
        model: a transformers model, quantised or not. (Of one that is wrapped already, adapters stay trainable.)
        use_gradient_checkpointing: recompute activations in the backward pass (quantised models only, as with HF PEFT).
        gradient_checkpointing_kwargs: for `gradient_checkpointing_enable`.
        auto_clear_cache: give the memory that casting has freed back to the GPU's driver.

    Returns:
        The model itself.
    """
    freeze_base(innermost(model))
    settle(model)
    casts = list(cast_on_cpu(model) if half_on_cpu(model) else [*cast_norms(model), *cast_head(model)])
    for line in table(casts):
        print(f"prepare_model_for_kbit_training: {line}")
    if is_quantized(model):
        leave_checkpoint(model)
    if auto_clear_cache and casts and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if use_gradient_checkpointing and is_quantized(model):
        enable_checkpointing(model, gradient_checkpointing_kwargs or {})
    return model


def freeze_base(model: nn.Module) -> None:
    """Freeze a base's own parameters; adapters of a wrapper over it are left alone."""
    for _, module in base_modules(model):
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad = False


def half_on_cpu(model: nn.Module) -> bool:
    """Whether some of the model is, or computes in, float16 on a CPU."""
    return any(
        p.device.type == "cpu" and p.dtype is torch.float16 and quantized_kind(m) is None
        for m in model.modules() for p in m.parameters(recurse=False)
    ) or any(
        kind == "4bit" and layer.compute_dtype is torch.float16 and layer.weight.device.type == "cpu"
        for kind, layer in quantized_layers(model)
    )  # fmt: skip


def cast_on_cpu(model: nn.Module) -> Iterator[tuple[str, str, int]]:
    """All 16-bit tensors that are not packed to fp32, and 4-bit layers' float16 products with them."""
    computing = [m for kind, m in quantized_layers(model) if kind == "4bit" and m.compute_dtype is torch.float16]
    for layer in computing:
        layer.compute_dtype = torch.float32
    for name, parameter in unpacked_parameters(model):
        if parameter.dtype in HALF:
            before = str(parameter.dtype).removeprefix("torch.")
            parameter.data = parameter.data.float()
            yield name, f"{before} -> float32 (a CPU cannot train in float16)", parameter.numel() * 4
    if computing:
        yield f"{len(computing)} 4-bit layers", "products in float32 instead of float16 (bfloat16 is faster)", 0


def cast_norms(model: nn.Module) -> Iterator[tuple[str, str, int]]:
    """16-bit norms to fp32, with hooks that keep the activations' dtype."""
    for name, module in model.named_modules():
        parameters = list(module.named_parameters(recurse=False))
        if "norm" not in type(module).__name__.lower() or any(p.dim() > 1 for _, p in parameters):
            continue
        for key, parameter in parameters:
            if parameter.dtype in HALF:
                before = str(parameter.dtype).removeprefix("torch.")
                module.__dict__["stored_dtype"] = parameter.dtype
                parameter.data = parameter.data.float()
                if _restore not in module._forward_hooks.values():
                    module.register_forward_pre_hook(_remember)
                    module.register_forward_hook(_restore)
                    module.register_state_dict_post_hook(_store)
                yield f"{name}.{key}", f"{before} -> float32", parameter.numel() * 4


def _remember(module: nn.Module, args: tuple) -> tuple | None:
    """Forward pre-hook of a norm: note the input's dtype; to fp32 where torch has no kernel for the mixture."""
    module.__dict__["input_dtype"] = args[0].dtype
    mixes = isinstance(module, nn.LayerNorm) and args[0].device.type == "cpu"
    takes_one = isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)) and not mixes
    return (args[0].float(), *args[1:]) if takes_one else None


def _restore(module: nn.Module, args: tuple, output: Any) -> Any:
    """Forward hook of a norm: the output in the input's dtype."""
    return output.to(module.__dict__["input_dtype"]) if torch.is_tensor(output) else output


def _store(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """State dict hook of a norm: in the 16-bit dtype that it came in (exactly), as the weights around it are saved."""
    for name, _ in module.named_parameters(recurse=False):
        value = state[f"{prefix}{name}"]
        short = value.to(module.__dict__["stored_dtype"])
        if torch.equal(short.to(value.dtype), value):  # not one that was trained since
            state[f"{prefix}{name}"] = short


def cast_head(model: Any) -> Iterator[tuple[str, str, int]]:
    """The product of a frozen 16-bit head in fp32; its weight is not copied."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(head) is nn.Linear and head.weight.dtype in HALF:
        head.__class__ = Float32Head
        name = next(n for n, m in model.named_modules() if m is head)
        kept = str(head.weight.dtype).removeprefix("torch.")
        yield name, f"product in float32 by tiles; the weight stays {kept}, no copy", 0


class Float32Head(nn.Linear):
    """A frozen head in a 16-bit dtype that gives fp32 logits: x [..., hidden] -> [..., vocabulary].

    Without a gradient and for a few tokens (decoding) the product is made in the head's own dtype: casting the whole weight
    for each new token would take most of the time.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype not in HALF or self.weight.requires_grad or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        tokens = x.numel() // x.shape[-1]
        if tokens < FEW and not (torch.is_grad_enabled() and x.requires_grad):
            return super().forward(x.to(self.weight.dtype)).float()
        return _HeadProduct.apply(x, self.weight, self.bias)


class _HeadProduct(torch.autograd.Function):
    """``x W^T + b`` in fp32 from a 16-bit W [V, H], a tile of its rows at a time; gradient for x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype = x.dtype
        logits = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=torch.float32)
        flat, wide = logits.view(-1, weight.shape[0]), x.reshape(-1, x.shape[-1]).float()
        for rows in tiles(weight):
            tile_bias = None if bias is None else bias[rows].float()
            flat[:, rows] = F.linear(wide, weight[rows].float(), tile_bias)
        return logits

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1]).float()
        total = flat.new_zeros((flat.shape[0], weight.shape[1]))
        for rows in tiles(weight):
            total += flat[:, rows] @ weight[rows].float()
        return total.view(*gradient.shape[:-1], weight.shape[1]).to(ctx.dtype), None, None


def tiles(weight: Tensor) -> Iterator[slice]:
    """Slices of the rows of a weight [V, H] that hold at most `TILE` elements each."""
    step = max(1, TILE // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        yield slice(start, start + step)


def leave_checkpoint(model: nn.Module) -> None:
    """Copy parameters that lie in a mapped safetensors file, so that the mapping can go (on Linux)."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return
    lines = (line.split(maxsplit=5) for line in maps.read_text().splitlines() if line.endswith(".safetensors"))
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    for parameter in model.parameters():
        place = parameter.data_ptr() if parameter.device.type == "cpu" else 0
        if any(start <= place < end for start, end in ranges):
            parameter.data = parameter.data.clone()


def table(casts: list[tuple[str, str, int]]) -> Iterator[str]:
    """One line a kind of tensor: names with the layer's number left out, how many, what was done, bytes."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name, what, size in casts:
        groups.setdefault((re.sub(r"\.\d+\.", ".*.", name), what), []).append(size)
    for (name, what), sizes in groups.items():
        count = f" ({len(sizes)})" if len(sizes) > 1 else ""
        yield f"{name}{count}: {what}, {sum(sizes):,} bytes"
    if len(groups) > 1:
        yield f"together {sum(size for _, _, size in casts):,} bytes"


def enable_checkpointing(model: Any, options: dict[str, Any]) -> None:
    """Activation checkpointing in the base; reentrant only where asked for."""
    if options.get("use_reentrant", False):
        model.enable_input_require_grads()
    newer = getattr(model, "activation_checkpointing_enable", None)  # transformers' newer name
    (newer or model.gradient_checkpointing_enable)(options or None)
