"""Fast forms of a base's modules, put in place while it is wrapped, and what packing needs to know of a family.

A module gets another class (a subclass of its own) rather than another forward: it can still be copied, pickled and quantised,
and taking the fast form off again is one assignment.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomGelu

from ..errors import UnsupportedError
from ..kernels.linear import onednn_wins, product
from ..routing import current_plan
from . import bloom
from .attention import attention_modules

segment_attention = "graftlm_segments"  # the name of our attention in transformers' registry


# -- modules -------------------------------------------------------------------------------------------------------------
class FastLinear(nn.Linear):
    """A linear layer by oneDNN in training (see `kernels.linear`)."""

    def forward(self, x: Tensor) -> Tensor:
        fast = self.training and torch.is_grad_enabled()
        return product(x, self.weight, self.bias) if fast else super().forward(x)


class FastNewGELU(NewGELUActivation):
    """The tanh approximation of GELU as one operation: GPT-2's and T5's is a formula of eight."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.gelu(input, approximate="tanh") if self.training else super().forward(input)


FAST: dict[type, type] = {
    BloomAttention: bloom.SegmentBloomAttention,
    BloomGelu: bloom.FastBloomGelu,
    NewGELUActivation: FastNewGELU,
}
_PLAIN = {fast: plain for plain, fast in FAST.items()} | {FastLinear: nn.Linear}


def speed_up(model: nn.Module) -> None:
    """Put the fast forms in place, in a base and in adapters. Repeatable."""
    for module in model.modules():
        if type(module) in FAST:
            module.__class__ = FAST[type(module)]
        elif type(module) is nn.Linear and module.weight.device.type == "cpu" and onednn_wins(module.weight.dtype):
            module.__class__ = FastLinear


def slow_down(base: nn.Module) -> None:
    """Give every module its own class back."""
    for module in base.modules():
        if type(module) in _PLAIN:
            module.__class__ = _PLAIN[type(module)]


# -- attention of packed rows --------------------------------------------------------------------------------------------
def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface over the running plan's segments: query [1, H, N, D], key and value [1, G, N, D]
    -> [1, N, H, D]."""
    plan = current_plan()
    if plan is None or plan.segments is None:
        raise UnsupportedError("Attention of packed rows was called outside a packed training pass.")
    unknown = [k for k in ("softcap", "s_aux", "position_bias") if kwargs.get(k) is not None]
    if unknown or not getattr(module, "is_causal", True):
        raise UnsupportedError(f"{type(module).__name__}: packed rows have no {', '.join(unknown) or 'two-way attention'}.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = getattr(module, "layer_idx", None) or 0
    return plan.segments.attend(query[0], key[0], value[0], layer, scale, dropout)[None], None


ALL_ATTENTION_FUNCTIONS.register(segment_attention, attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(segment_attention, lambda *args, **kwargs: None)


def attention_configs(base: nn.Module) -> list[Any]:
    """The configurations that a base's attention modules and mask functions read."""
    found = {id(c): c for c in (getattr(m, "config", None) for m in base.modules()) if c is not None}
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
    """ALiBi's slopes of a base whose attention adds them itself for each segment (Bloom), else None."""
    return next((bloom.slopes(m) for m in base.modules() if isinstance(m, bloom.SegmentBloomAttention)), None)


def has_dropout(base: nn.Module) -> bool:
    """Whether the base drops anything in training: then no two sequences may share what they compute."""
    layers = any(isinstance(m, nn.Dropout) and m.p > 0 for m in base.modules())
    names = {n for _, m in attention_modules(base) for n in vars(m) if "dropout" in n}
    names |= {n for m in base.modules() for n in ("dropout", "activation_dropout") if isinstance(vars(m).get(n), float)}
    return layers or any(isinstance(vars(m).get(n), float) and vars(m)[n] > 0 for m in base.modules() for n in names)
