"""Quantised bases: loading options, recognising them, taking layers apart and putting them together again.

Alone imports bitsandbytes. Kinds of layer: "int8" (LLM.int8(), arXiv:2208.07339), "4bit" (NF4 and FP4 of QLoRA,
arXiv:2305.14314) and "torchao" (weight-only tensor subclasses). Weights are [out, in] once dequantised.

On CPUs with AVX512-BF16 bitsandbytes packs a 4-bit layer at its first evaluation pass for a much faster kernel, which has
no backward, computes in bf16 and rounds the block statistics for good. Here (`settle`) a layer packs only where its compute
dtype is bf16 anyway, keeps its statistics, and is unpacked exactly before a gradient must pass or its weight is read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .errors import ConfigError, UnsupportedError, nearest
from .kernels.linear import owned, plain_product, product, working_dtype
from .kernels.order import first_order

SCHEMES = ("int8", "nf4", "fp4")
_WEIGHTS = {"SCB": "Int8Params", "quant_state": "Params4bit"}  # bitsandbytes' parameters by an attribute of theirs
_PACK_ROWS = 32  # rows that bitsandbytes' packed kernel takes together


# -- what a base is ------------------------------------------------------------------------------------------------------
def quantized_kind(layer: Any) -> str | None:
    """ "int8", "4bit" or "torchao" for a quantised layer, else None."""
    weight = getattr(layer, "weight", None)
    if type(weight).__module__.startswith("torchao"):
        return "torchao"
    return {"Int8Params": "int8", "Params4bit": "4bit"}.get(type(weight).__name__)


def quantized_layers(base: nn.Module) -> Iterator[tuple[str, Any]]:
    """A base's quantised layers with their kinds, without the adapter modules around them (which answer for them)."""
    for module in base.modules():
        if (kind := quantized_kind(module)) is not None and not hasattr(module, "base_layer"):
            yield kind, module


def holds_quantized(module: nn.Module) -> bool:
    """Whether there is a quantised layer in a module."""
    return any(True for _ in quantized_layers(module))


def unpacked_parameters(base: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The floating-point parameters that are no quantised weight, with their names."""
    for name, module in base.named_modules():
        for key, parameter in module.named_parameters(name, recurse=False):
            if parameter.is_floating_point() and not (key.rpartition(".")[2] == "weight" and quantized_kind(module)):
                yield key, parameter


def scheme_of(base: nn.Module) -> str | None:
    """How a model is quantised: "int8", "nf4", "fp4", "torchao", transformers' name of another method, or None."""
    for kind, layer in quantized_layers(base):
        return layer.weight.quant_type if kind == "4bit" else kind
    return config_scheme(getattr(base, "config", None)) if getattr(base, "is_quantized", False) else None


def config_scheme(config: Any) -> str | None:
    """The same from a configuration, before any weights are loaded."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    get = stored.get if isinstance(stored, dict) else lambda key, default=None: getattr(stored, key, default)
    method = get("quant_method", None) or "bitsandbytes"
    if getattr(method, "value", method) not in ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"):
        return str(getattr(method, "value", method))
    return str(get("bnb_4bit_quant_type", "fp4")) if get("load_in_4bit", False) else "int8"


def is_quantized(base: nn.Module) -> bool:
    """Whether a model was loaded quantised."""
    return bool(getattr(base, "is_quantized", False)) or holds_quantized(base)


def loading_options(scheme: str, compute_dtype: torch.dtype, device: str | torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantise a model while it is loaded.

    Args:
        scheme: "int8", "nf4" or "fp4" (the last two with double quantisation).
        compute_dtype: of 4-bit layers' products.
        device: where the model goes; quantised models cannot be moved freely afterwards.

    Raises:
        ConfigError: an unknown scheme. UnsupportedError: bitsandbytes is missing.
    """
    if scheme not in SCHEMES:
        raise ConfigError(f"quantization={scheme!r}: expected one of {', '.join(SCHEMES)}{nearest(scheme, SCHEMES)}")
    bitsandbytes()
    from transformers import BitsAndBytesConfig

    if scheme == "int8":
        settings = BitsAndBytesConfig(load_in_8bit=True)
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=scheme,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    return {"quantization_config": settings, "device_map": {"": str(device)}}


def bitsandbytes() -> Any:
    """The library; UnsupportedError where it is missing or broken."""
    try:
        import bitsandbytes as library
    except (ImportError, RuntimeError, OSError) as error:
        raise UnsupportedError(
            f"int8 and 4-bit bases need bitsandbytes, which cannot be imported ({error}): pip install bitsandbytes"
        ) from error
    return library


# -- weights -------------------------------------------------------------------------------------------------------------
def dequantize(layer: nn.Module) -> Tensor:
    """A layer's weight in floating point, in the layer's own layout; the parameter itself where it is not quantised.

    Raises:
        UnsupportedError: a scheme that GraftLM cannot read.
    """
    weight: Any = layer.weight
    kind = quantized_kind(layer)
    if kind == "4bit":
        if weight.quant_state is None:
            raise UnsupportedError("This 4-bit layer holds no quantised weight yet: load the model before adapting it.")
        unpack(layer)
        return bitsandbytes().functional.dequantize_4bit(weight.data, weight.quant_state)
    if kind == "int8":
        state: Any = layer.state
        scale = state.SCB if state.SCB is not None else weight.SCB
        data = weight.data if state.CB is None else state.CB
        return data.to(torch.float32) * (scale.view(-1, 1) / 127.0)
    if kind == "torchao":
        return weight.dequantize()
    if not weight.is_floating_point():
        raise UnsupportedError(
            f"{type(layer).__name__} ({weight.dtype}) is quantised by a scheme that GraftLM cannot dequantise; it reads "
            "bitsandbytes' int8, NF4 and FP4 and torchao's weight-only tensors. Load the base with one of these."
        )
    return weight


class DequantizedLinear(nn.Linear):
    """A linear layer in bf16 among activations of any dtype: x [..., in] -> [..., out] in x's dtype.

    The weight is brought to x's dtype for the product, as reloading the saved model in that dtype would do.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class DequantizedConv1D(Conv1D):
    """The same for GPT-2's layers, whose weight lies [in, out]."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.T.to(x.dtype), self.bias.to(x.dtype))


def dequantized(layer: Any, weight: Tensor) -> nn.Module:
    """A frozen bf16 layer with `weight` [out, in] and the quantised layer's bias."""
    made = DequantizedLinear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight.to(torch.bfloat16).contiguous(), requires_grad=False)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    made.__dict__["source_cls"] = source_class(layer)
    return made.train(layer.training)


def source_class(layer: nn.Module) -> Any:
    """The class of the layer that transformers quantised into this one (it keeps it as `source_cls`)."""
    return layer.__dict__.get("source_cls", nn.Linear)


def compute_in(base: nn.Module, dtype: torch.dtype) -> None:
    """Let a base's 4-bit layers make their products in a dtype, whatever was chosen when it was loaded."""
    for kind, layer in quantized_layers(base):
        if kind == "4bit":
            layer.compute_dtype, layer.compute_type_is_set = dtype, True


def in_source_form(layer: Any) -> nn.Module:
    """A `DequantizedLinear` as its model's class has the layer, so that its file fits: GPT-2's is a `Conv1D`."""
    if type(layer) is not DequantizedLinear or not issubclass(source_class(layer), Conv1D):
        return layer
    with torch.device("meta"):
        made = DequantizedConv1D(layer.out_features, layer.in_features)
    made.weight = nn.Parameter(layer.weight.detach().T.contiguous(), requires_grad=False)
    made.bias = layer.bias  # type: ignore[assignment]
    return made.train(layer.training)


def requantized(layer: Any, weight: Tensor) -> nn.Module:
    """A layer of the same kind and settings as `layer` with another weight [out, in] (rounded to its levels)."""
    library, kind = bitsandbytes(), quantized_kind(layer)
    bias, device = layer.bias is not None, layer.weight.device
    if kind == "4bit":
        old = layer.weight
        made = library.nn.Linear4bit(
            layer.in_features, layer.out_features, bias, layer.compute_dtype, old.compress_statistics, old.quant_type,
            old.quant_storage,
        )  # fmt: skip
        made.weight = library.nn.Params4bit(
            weight.cpu(), False, quant_type=old.quant_type, blocksize=old.quant_state.blocksize,
            compress_statistics=old.compress_statistics, quant_storage=old.quant_storage, module=made,
        )  # fmt: skip
    elif kind == "int8":
        made = library.nn.Linear8bitLt(
            layer.in_features, layer.out_features, bias, has_fp16_weights=False, threshold=layer.state.threshold
        )
        made.weight = library.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    else:
        raise UnsupportedError(f"A {kind} layer cannot be quantised anew in place; merge into a bf16 copy (the default).")
    if bias:
        made.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    made.__dict__["source_cls"] = source_class(layer)
    made = made.to(device).train(layer.training)
    settle(made)
    return made


def round_to_levels(weight: Tensor, scheme: str) -> Tensor:
    """`weight` [out, in] as it would come back from quantisation by "int8", "nf4" or "fp4", fp32."""
    library = bitsandbytes()
    if scheme == "int8":
        data, scale, _ = library.functional.int8_vectorwise_quant(weight.to(torch.float16))
        return data.float() * (scale.view(-1, 1) / 127.0)
    data, state = library.functional.quantize_4bit(weight.float(), quant_type=scheme)
    return library.functional.dequantize_4bit(data, state).view(weight.shape)


class _Product(torch.autograd.Function):
    """``x W^T + b`` of a quantised W, dequantised for each product and kept in no other form."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any, bias: Tensor | None) -> Tensor:
        ctx.layer = layer
        return owned(product(x, dequantize(layer).to(x.dtype), bias))

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        flat = gradient.reshape(-1, gradient.shape[-1])
        made = plain_product(flat, dequantize(ctx.layer).to(flat.dtype).t())
        return made.view(*gradient.shape[:-1], -1), None, None


def linear_4bit(layer: Any, otherwise: Any, x: Tensor) -> Tensor:
    """A 4-bit layer's product, x [..., in] -> [..., out], by the fastest way for its dtype: in training, and in evaluation
    in 16 bits where the processor multiplies these slowly.

    `otherwise` is bitsandbytes' way: the same product by torch's default.
    """
    plain = layer.compute_type_is_set and not torch.is_autocast_enabled(x.device.type)
    if not plain or layer.weight.quant_state is None or (layer.bias is not None and layer.bias.requires_grad):
        return otherwise(x)
    dtype = layer.compute_dtype or x.dtype
    if not x.requires_grad and (layer.support_avx512bf16_for_cpu or working_dtype(dtype, x.device) is dtype):
        return otherwise(x)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return _Product.apply(x.to(dtype), layer, bias).to(x.dtype)


def linear_int8(layer: Any, otherwise: Any, x: Tensor) -> Tensor:
    """An int8 layer's training product in 16 bits, where the processor multiplies these slowly: x [..., in] -> [..., out].

    There bitsandbytes dequantises into x's dtype as well and multiplies by torch's default (`otherwise`).
    """
    slow = x.requires_grad and layer.training and working_dtype(x.dtype, x.device) is not x.dtype
    trained = layer.bias is not None and layer.bias.requires_grad
    if not slow or trained or layer.state.has_fp16_weights or torch.is_autocast_enabled(x.device.type):
        return otherwise(x)
    return _Product.apply(x, layer, None if layer.bias is None else layer.bias.to(x.dtype))


# -- packed 4-bit layers on CPUs -----------------------------------------------------------------------------------------
def settle(base: nn.Module) -> None:
    """Make a base's 4-bit layers safe for training and evaluation in turns (see the module's docstring). Idempotent.

    And let bitsandbytes say once, not at every int8 product, that it rounds the inputs to float16; and give weights that
    come out of a pickle their class back.
    """
    for layer in base.modules():
        weight: Any = layer._parameters.get("weight")
        if type(weight) is nn.Parameter and (name := next((_WEIGHTS[k] for k in weight.__dict__ if k in _WEIGHTS), None)):
            weight.__class__ = getattr(bitsandbytes().nn, name)
    for kind, layer in quantized_layers(base):
        if kind == "int8":
            logging.getLogger("bitsandbytes.autograd._functions").addFilter(_each_once)
        if kind == "4bit" and hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = layer.support_avx512bf16_for_cpu and _may_pack(layer)
            if _guard not in layer._forward_pre_hooks.values():
                layer.register_forward_pre_hook(_guard)
                layer.register_state_dict_pre_hook(_unpack_for_saving)


_said: set[str] = set()


def _each_once(record: logging.LogRecord) -> bool:
    """Logging filter: every message once."""
    text = record.getMessage()
    new = text not in _said
    _said.add(text)
    return new


def _may_pack(layer: Any) -> bool:
    """Whether the packed kernel can take the layer and computes in the layer's own dtype."""
    state = layer.weight.quant_state
    fits = state is None or (state.shape[0] % _PACK_ROWS == 0 and state.shape[1] % state.blocksize == 0)
    return fits and layer.compute_dtype is torch.bfloat16


def _guard(layer: Any, args: tuple) -> None:
    """Forward pre-hook of a 4-bit layer: no gradient passes a packed weight, and packing loses nothing."""
    state, x = layer.weight.quant_state, args[0]
    passes = torch.is_grad_enabled() and x.requires_grad
    if passes or layer.training:
        if passes and layer.compute_dtype is torch.float16 and x.device.type == "cpu":
            raise UnsupportedError(
                "These 4-bit layers compute in float16, which cannot be trained on a CPU (no gradient scaling). Load the "
                "base with bnb_4bit_compute_dtype=torch.bfloat16, or call graftlm.prepare_model_for_kbit_training(base)."
            )
        unpack(layer)
    elif layer.support_avx512bf16_for_cpu and x.device.type == "cpu" and not getattr(state, "packing_format_for_cpu", False):
        layer.__dict__["statistics"] = {k: getattr(state, k, None) for k in _STATISTICS}


def _unpack_for_saving(layer: Any, prefix: str, keep_vars: bool) -> None:
    """Before `state_dict`: the standard layout (bitsandbytes' own way back would round the statistics)."""
    unpack(layer)


_STATISTICS = ("absmax", "offset", "state2", "nested", "dtype")


def unpack(layer: Any) -> None:
    """Bring a packed 4-bit layer back to the standard layout; exactly, where it was packed after `settle`."""
    state = layer.weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        return
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    kept = layer.__dict__.pop("statistics", None)
    if kept is not None:
        state.original_nested = False
    layer.weight.data, state = _convert_weight_packed_for_cpu_inverse(layer.weight.data, state)
    for key, value in (kept or {}).items():
        setattr(state, key, value)
    layer.weight.quant_state = layer.quant_state = state
