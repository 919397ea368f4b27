"""Fast forms of a base's modules, put in place while it is wrapped, and what packing needs to know of a family.

A module gets another class, a subclass of its own, rather than another forward: taking the fast form off again is one
assignment, and copies and pickles are of the plain class.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomGelu
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedError
from ..kernels import dropout, norm
from ..kernels.dropout import CheapDropout
from ..kernels.linear import CHOSEN, product, working_dtype
from ..kernels.packed import packed, packed_product
from ..quantization import linear_4bit, linear_int8, quantized_kind
from ..routing import current_scope
from . import bloom, gated
from .walk import base_modules

segment_attention = "graftlm_segments"  # the name of our attention in transformers' registry

Forward = Callable[..., Any]


# -- modules -------------------------------------------------------------------------------------------------------------
class Fast:
    """Marks a class made by `fast_class`; `plain_class` is what it stands for."""

    plain_class: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return _new, (self.plain_class,), *reduced[2:]


def _new(plain: Any) -> Any:
    return plain.__new__(plain)


@functools.cache
def fast_class(plain: Any, forward: Any) -> Any:
    """A subclass of `plain` that computes by `forward(module, plain's forward, *inputs)`: in training, and where
    `EVALUATES` says so in evaluation; else as before.

    A packed row goes the fast way at any rate, so that the engine tries it out with what it will train with.
    """
    always = forward in EVALUATES

    def either(self: Any, *args: Any, **kwargs: Any) -> Any:
        scope = current_scope()
        trains = always or (self.training and torch.is_grad_enabled()) or (scope is not None and scope.attention is not None)
        if torch.compiler.is_compiling() or not trains:
            return plain.forward(self, *args, **kwargs)
        return forward(self, functools.partial(plain.forward, self), *args, **kwargs)

    either.__signature__ = _signature(plain)  # type: ignore[attr-defined]
    body = {"forward": either, "plain_class": plain, "__module__": plain.__module__, "__qualname__": plain.__qualname__}
    return type(plain.__name__, (Fast, plain), body)


def _signature(plain: Any) -> Any:
    import inspect

    return inspect.signature(plain.forward)


def linear(module: nn.Linear, otherwise: Forward, x: Tensor) -> Tensor:
    """A linear layer in the fastest way (see `kernels.linear`)."""
    return by_fastest(module, x, module.weight)


def conv1d(module: Conv1D, otherwise: Forward, x: Tensor) -> Tensor:
    """The same for GPT-2's layers, whose weight lies [in, out]."""
    return by_fastest(module, x, module.weight.t())


def by_fastest(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T + b`` of a layer; by what is kept of its weight, if anything is. weight: the layer's, as [out, in]."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        if working_dtype(dtype, x.device) is not dtype:  # autocast's own products would be as slow
            with torch.autocast("cpu", enabled=False):
                bias = None if module.bias is None else module.bias.to(dtype)
                return product(x.to(dtype), weight.to(dtype), bias)
    if (kept := packed(x, module.weight, module.bias)) is not None:
        return packed_product(x, kept, module.weight, module.bias)
    return product(x, weight, module.bias)


def tanh_gelu(module: nn.Module, otherwise: Forward, x: Tensor) -> Tensor:
    """GELU's tanh approximation (arXiv:1606.08415) as one operation; in Python it is eight, each with a tensor kept."""
    return F.gelu(x, approximate="tanh")


def cheap_dropout(module: nn.Dropout, otherwise: Forward, x: Tensor) -> Tensor:
    """Dropout whose mask is drawn quickly."""
    return otherwise(x) if module.inplace else dropout(x, module.p, module.training)


def cheap_dropouts(module: nn.Module, otherwise: Forward, *args: Any, **kwargs: Any) -> Any:
    """A layer that calls torch's dropout itself (OPT, BART), with masks that are drawn quickly."""
    x = args[0] if args else kwargs.get("hidden_states")
    pays = module.training and isinstance(x, Tensor) and x.numel() >= WORTH_A_MODE
    with CheapDropout() if pays else nullcontext():
        return otherwise(*args, **kwargs)


WORTH_A_MODE = 2**15  # elements of a layer's input; under that the mode's calls cost what quick masks save


def rms_norm(module: Any, otherwise: Forward, x: Tensor) -> Tensor:
    """An RMSNorm that keeps its input and one number a token."""
    if module.weight.requires_grad or x.dtype is not module.weight.dtype:
        return otherwise(x)
    return norm.rms_norm(x, module.weight, _epsilon(module), one_more=False)


def rms_norm_plus_one(module: Any, otherwise: Forward, x: Tensor) -> Tensor:
    """The same where the weight is a difference to one (Gemma)."""
    if module.weight.requires_grad or x.dtype is not module.weight.dtype:
        return otherwise(x)
    return norm.rms_norm(x, module.weight, _epsilon(module), one_more=True)


def _epsilon(module: Any) -> Any:
    return getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)


FORWARDS: dict[type, Forward] = {
    BloomAttention: bloom.attention,
    BloomGelu: tanh_gelu,
    NewGELUActivation: tanh_gelu,
    nn.Dropout: cheap_dropout,
}


LINEAR: dict[type, Forward] = {nn.Linear: linear, Conv1D: conv1d}
# Forms that bring as much in evaluation, and those that go by their module's own mode: under reentrant checkpointing a
# layer's first pass has no gradient, and must draw the masks that its second one draws.
EVALUATES: set[Forward] = {linear, conv1d, linear_4bit, cheap_dropout, cheap_dropouts}


def forward_for(module: nn.Module, tried: dict) -> Forward | None:
    """The fast forward of a module, or None; `tried` keeps what was found of modules like it."""
    kind = type(module)
    if kind in LINEAR:
        weight: Any = module.weight
        return LINEAR[kind] if weight.device.type == "cpu" and weight.dtype in CHOSEN else None
    if "weight" in module._parameters and quantized_kind(module) == "4bit" and module.weight.device.type == "cpu":  # type: ignore[union-attr]
        return linear_4bit
    if "weight" in module._parameters and quantized_kind(module) == "int8" and module.weight.device.type == "cpu":  # type: ignore[union-attr]
        return linear_int8
    if kind.__name__.endswith(("RMSNorm", "T5LayerNorm")) and not issubclass(kind, Fast):
        return _norm_forward(module)
    if isinstance(module, GradientCheckpointingLayer) and drops_by_itself(module):
        return cheap_dropouts
    return FORWARDS.get(kind) or gated.mlp_forward(module, tried)


def drops_by_itself(layer: nn.Module) -> bool:
    """Whether a layer on a CPU calls torch's dropout outside its attention (whose kernel takes the rate)."""
    calls = any(keeps_rates(m) for _, m in base_modules(layer) if "Attention" not in type(m).__name__)
    return calls and all(p.device.type == "cpu" for p in layer.parameters())


def keeps_rates(module: nn.Module) -> bool:
    """Whether a module keeps rates of dropout above zero as numbers, for torch's function."""
    return any("drop" in name and isinstance(value, float) and value > 0 for name, value in vars(module).items())


def drops(module: nn.Module) -> bool:
    """Whether a module itself, not one within it, drops anything in training."""
    return keeps_rates(module) or (isinstance(module, nn.Dropout) and module.p > 0)


_NORMS: dict[tuple, Forward | None] = {}


def _norm_forward(module: Any) -> Forward | None:
    """Which of the two RMSNorms a family's own computes, found by trying; None if neither."""
    weight, epsilon = getattr(module, "weight", None), _epsilon(module)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(epsilon, float):
        return None
    kind = weight.device.type
    if kind not in ("cpu", "cuda"):
        return None
    key = type(module), weight.dtype, kind
    if key not in _NORMS:
        drawn = torch.randn(4, weight.shape[0], generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
        like = copy.copy(module)  # with weights that tell: fresh ones are all one, also where they are not read
        like._parameters = module._parameters | {"weight": nn.Parameter(drawn[0], requires_grad=False)}
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            wanted = type(module).forward(like, drawn[1:])
            tried = {f: f(like, lambda x: torch.full_like(x, torch.nan), drawn[1:]) for f in (rms_norm, rms_norm_plus_one)}
        _NORMS[key] = next((f for f, y in tried.items() if y.dtype is wanted.dtype and torch.equal(y, wanted)), None)
    return _NORMS[key]


def speed_up(model: nn.Module) -> None:
    """Put the fast forms in place, in a base and in adapters. Repeatable."""
    module: Any
    tried: dict = {}
    for module in model.modules():
        forward = None if isinstance(module, Fast) else forward_for(module, tried)
        if forward is not None:
            module.__class__ = fast_class(type(module), forward)  # type: ignore[arg-type]


def slow_down(base: nn.Module) -> None:
    """Give every module its own class back."""
    for module in base.modules():
        if isinstance(module, Fast):
            module.__class__ = module.plain_class


# -- attention of packed rows --------------------------------------------------------------------------------------------
def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface over the running scope's attention: query [1, H, N, D], key and value [1, G, N, D]
    -> [1, N, H, D]."""
    scope = current_scope()
    if scope is None or scope.attention is None:  # another thread's pass over the same base
        usual = ALL_ATTENTION_FUNCTIONS[_usual(module.config)]
        return usual(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    unknown = [k for k in ("softcap", "s_aux", "position_bias") if kwargs.get(k) is not None]
    if unknown or not getattr(module, "is_causal", True):
        raise UnsupportedError(f"{type(module).__name__}: packed rows have no {', '.join(unknown) or 'two-way attention'}.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = getattr(module, "layer_idx", None) or 0
    return scope.attention.attend(query[0], key[0], value[0], layer, scale, dropout)[None], None


ALL_ATTENTION_FUNCTIONS.register(segment_attention, attend)


_USUAL: dict[int, str] = {}  # configurations whose attention is ours now, and what it is otherwise


def _usual(config: Any) -> str:
    name = _USUAL.get(id(config), "sdpa")
    return name if name in ALL_ATTENTION_FUNCTIONS else "sdpa"


@contextmanager
def packed_attention(configs: list[Any]) -> Iterator[None]:
    """Within the block the attention of a base with these configurations goes sequence by sequence (in this thread)."""
    before = [(config, config._attn_implementation_internal) for config in configs]
    for config, name in before:
        if name != segment_attention:
            _USUAL[id(config)] = name or "sdpa"
        config._attn_implementation_internal = segment_attention
    try:
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name


def no_mask(*args: Any, **kwargs: Any) -> Any:
    """What layers get as mask in a packed pass: nothing reads it, and it fits no scores.

    A layer that someone's own activation checkpointing runs again, outside the pass and so with the base's own attention,
    fails by it instead of mixing the sequences.
    """
    scope = current_scope()
    if scope is None or scope.attention is None:  # another thread's pass
        return ALL_MASK_ATTENTION_FUNCTIONS[_usual(kwargs.get("config"))](*args, **kwargs)
    return torch.zeros(()).expand(1, 1, 3, 5)


ALL_MASK_ATTENTION_FUNCTIONS.register(segment_attention, no_mask)


def attention_configs(base: nn.Module) -> list[Any]:
    """The configurations that a base's attention modules and mask functions read."""
    found = {id(c): c for c in (getattr(m, "config", None) for _, m in base_modules(base)) if c is not None}
    return [c for c in found.values() if hasattr(c, "_attn_implementation_internal")]


def attention_window(base: Any) -> int | None:
    """The shortest reach of any layer's attention, in tokens; None where every token sees all before it."""
    config = base.config.get_text_config(decoder=True) if hasattr(base.config, "get_text_config") else base.config
    reaches = [getattr(config, "attention_chunk_size", None)]
    if getattr(config, "use_sliding_window", True):
        reaches.append(getattr(config, "sliding_window", None))
    reaches += [getattr(config, "window_size", None) if getattr(config, "attention_types", None) else None]  # GPT-Neo
    return min((r for r in reaches if isinstance(r, int)), default=None)


def alibi_slopes(base: nn.Module) -> Tensor | None:
    """ALiBi's slopes of a base whose attention leaves them to the segments (Bloom), else None."""
    return next((bloom.slopes(m) for _, m in base_modules(base) if isinstance(m, BloomAttention)), None)


def has_dropout(base: nn.Module) -> bool:
    """Whether the base drops anything in training: then no two sequences may share what they compute."""
    return any(drops(m) for _, m in base_modules(base))
