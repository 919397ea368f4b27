"""(IA)3: learned vectors that scale what layers give or read (arXiv:2205.05638, section 3.3).

``y = l * (W x + b)``, l [out]; in a feed-forward half's last layer ``y = W (l * x) + b``, l [in]. l starts at one, so an
untrained adapter changes nothing. Field names, defaults, maths and files are HF PEFT's; what differs from it:
* unmerging gives the base back bit for bit (HF PEFT divides by l, which is inexact, and by nearly zero where l is);
* families that HF PEFT has no default layers for have some here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..architectures import Targets, model_type, target_family
from ..errors import ConfigError, TargetError
from ..layers import Change, Frozen, Held
from .base import PeftType, Site, register
from .fields import also_takes, check_expressions
from .layered import LayerConfig, LayerMethod

_KV, _QV, _FUSED = ["k_proj", "v_proj", "down_proj"], ["q_proj", "v_proj", "down_proj"], ["query_key_value", "dense_4h_to_h"]
_BERT = ["key", "value", "output.dense"]

# Default targets by `config.model_type`, that of the feed-forward half last: HF PEFT's table, and families that it lacks.
TARGETS: Targets = {
    "bart": ["q_proj", "v_proj", "fc2"], "bert": _BERT, "bloom": ["query_key_value", "mlp.dense_4h_to_h"],
    "chatglm": _FUSED, "deberta": ["in_proj", "output.dense"], "deberta-v2": ["key_proj", "value_proj", "output.dense"],
    "electra": _BERT, "falcon": _FUSED, "RefinedWeb": _FUSED, "RefinedWebModel": _FUSED, "gemma": _QV, "gemma2": _QV,
    "gemma3": _QV, "gemma3_text": _QV, "glm": _KV, "glm4": _KV, "gpt2": ["c_attn", "mlp.c_proj"],
    "gpt_bigcode": ["c_attn", "mlp.c_proj"], "gpt_neo": ["q_proj", "v_proj", "c_proj"], "gpt_neox": _FUSED,
    "gptj": ["q_proj", "v_proj", "fc_out"], "llama": _KV, "llama4": _QV, "mbart": ["q_proj", "v_proj", "fc2"],
    "mistral": _KV, "mixtral": ["k_proj", "v_proj", "w2"], "mt5": ["k", "v", "wi_1"], "olmo2": _KV,
    "opt": ["q_proj", "k_proj", "fc2"], "pegasus": ["q_proj", "v_proj", "fc2"], "phi": ["q_proj", "v_proj", "fc2"],
    "phi3": ["qkv_proj", "down_proj"], "qwen2": _QV, "qwen3": _QV, "roberta": _BERT, "stablelm": _KV,
    "t5": ["k", "v", "wo"], "umt5": ["k", "v", "wo"],
}  # fmt: skip
_WITHOUT = {"mt5"}  # HF PEFT scales what the feed-forward half's layer gives there


@also_takes({"peft_version": ...})
@dataclass(kw_only=True)
class IA3Config(LayerConfig):
    """Configuration of (IA)3.

    Args:
        feedforward_modules: those of the targets whose input is scaled instead of their output: names (endings) or a regular
            expression; None takes the family's default.
        fan_in_fan_out: accepted for HF PEFT's sake; the layout is read from the module.
        init_ia3_weights: start at one; False starts at random.
    """

    feedforward_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    neutral_fields: ClassVar[frozenset[str]] = frozenset({"init_ia3_weights", "feedforward_modules"})  # shapes tell

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.IA3
        check_expressions("feedforward_modules", self.feedforward_modules)
        if isinstance(self.feedforward_modules, list) and isinstance(self.target_modules, list):
            for name in self.feedforward_modules:
                if name not in self.target_modules:
                    raise ConfigError(f"feedforward_modules: {name!r} is not among target_modules={self.target_modules}.")


class ScaledOutput(Change):
    """``y = l * (W x + b)``: `ia3_l` [out, 1], of a convolution by channels [1, out, 1, …]."""

    tables: ClassVar[tuple[str, ...]] = ("ia3_l",)

    def __init__(self, ones: bool) -> None:
        self.ones = ones

    def create(self, t: Held, frozen: Frozen, dtype: torch.dtype, initialise: bool) -> None:
        value = torch.ones if self.ones or not initialise else torch.randn
        size = self.size(frozen)
        if frozen.kind == "conv":
            size = (1, max(size), *[1] * (frozen.layer.weight.dim() - 2))
        t["ia3_l"] = nn.Parameter(value(size, dtype=dtype, device=frozen.device))

    def size(self, frozen: Frozen) -> tuple[int, ...]:
        return frozen.features[0], 1

    def leave(self, t: Held, x: Tensor, y: Tensor, bias: Tensor | None, frozen: Frozen) -> Tensor:
        return scaled(y, t["ia3_l"])

    def fold(self, t: Held, weight: Tensor, frozen: Frozen) -> Tensor:
        return weight * t["ia3_l"].reshape(-1, 1)

    def bias(self, t: Held, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else bias * t["ia3_l"].flatten()


class ScaledInput(ScaledOutput):
    """``y = W (l * x) + b``: `ia3_l` [1, in], of a convolution by channels [1, in, 1, …]."""

    def size(self, frozen: Frozen) -> tuple[int, ...]:
        return 1, frozen.features[1]

    def enter(self, t: Held, x: Tensor) -> Tensor:
        return scaled(x, t["ia3_l"])

    def leave(self, t: Held, x: Tensor, y: Tensor, bias: Tensor | None, frozen: Frozen) -> Tensor:
        return y

    def fold(self, t: Held, weight: Tensor, frozen: Frozen) -> Tensor:
        if frozen.kind != "conv":
            return weight * t["ia3_l"]
        groups = frozen.layer.groups  # each reads channels of its own: rows [groups, out / groups, in / groups, kernel]
        vector = t["ia3_l"].reshape(groups, 1, -1, 1)
        return (weight.reshape(groups, frozen.shape[0] // groups, vector.shape[2], -1) * vector).reshape(weight.shape)

    def bias(self, t: Held, bias: Tensor | None) -> Tensor | None:
        return bias


def scaled(x: Tensor, vector: Tensor) -> Tensor:
    """x [..., n] (channels [..., n, *places]) times a vector of n numbers, in the vector's dtype, as x's."""
    vector = vector[0] if vector.dim() > 2 else vector.flatten()
    return (x.to(torch.promote_types(x.dtype, vector.dtype)) * vector).to(x.dtype)


class IA3(LayerMethod):
    """One (IA)3 adapter in a host."""

    title = "(IA)3"
    kinds = ("linear", "conv")
    takes = "linear layers (torch's, bitsandbytes', Conv1D) and convolutions"
    families = TARGETS

    def attach(self, host: Site, *, for_loading: bool = False) -> None:
        config: IA3Config = self.config  # type: ignore[assignment]
        if config.feedforward_modules is None:
            kind = target_family(host.base, TARGETS)
            if kind is None:
                own = model_type(host.base)
                raise TargetError(
                    f"There are no default feedforward_modules for model type {own!r}. Name those of target_modules that "
                    "stand last in a feed-forward half ([] for none)."
                )
            config.feedforward_modules = [] if kind in _WITHOUT else TARGETS[kind][-1:]
        super().attach(host, for_loading=for_loading)

    def change(self, host: Site, path: str, frozen: Frozen) -> Change:
        config: IA3Config = self.config  # type: ignore[assignment]
        names = config.feedforward_modules
        within = re.fullmatch(names, path) if isinstance(names, str) else path.endswith(tuple(names or ()))
        return (ScaledInput if within else ScaledOutput)(config.init_ia3_weights)


register(PeftType.IA3, IA3Config, IA3)
