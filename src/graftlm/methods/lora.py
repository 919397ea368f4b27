"""LoRA: a low-rank update beside frozen layers (arXiv:2106.09685), with rsLoRA, DoRA, PiSSA and OLoRA.

``y = W x + b + scale * B A dropout(x)``, A [r, in], B [out, r], scale = lora_alpha / r.

Decisions, and what differs from HF PEFT (whose field names, defaults, maths and files these are):
* the base weight is never changed, not by PiSSA and OLoRA (see `lora_change`), not by `bias` training (the trained bias
  is held by the adapter and added as a difference), so several adapters and wrappers can share one base exactly;
* an entry of `target_modules` that matches nothing is named in a warning; nothing matching at all raises;
* merging keeps the unmerged weight, so that `unmerge_adapter` gives the base back bit for bit.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..architectures import base_modules, clean_path
from ..errors import ConfigError, UnsupportedError, nearest
from ..files import checkpoint_weight
from ..layers import KINDS, Adapted, Change, Frozen, as_it_was, both_forms
from ..quantization import source_class
from ..routing import by_group
from .base import PeftType, Site, register
from .fields import Count, Number, Probability, also_takes, check_expressions
from .layered import LayerConfig, LayerMethod
from .lora_change import EmbeddingChange, LoraChange
from .lora_conv import OUT_PROJ, ConvChange, check_dropout
from .targets import is_uncalled, pattern_value

INITS = ("gaussian", "pissa", "olora", "loftq")
# On a quantised base LoftQ's adapter is like any other; HF PEFT, told of the start, would quantise the base anew to load it.
LOFTQ_FIELDS = frozenset({"init_lora_weights", "loftq_config"})


@dataclass(kw_only=True)
class LoftQConfig:
    """How LoftQ's start values are made: bits of the quantised base (4: NF4, 8: int8) and steps (1; see `lora_init`)."""

    loftq_bits: int = 4
    loftq_iter: int = 1


# Fields of HF PEFT's LoraConfig that are not here, with their neutral values.
ELSEWHERE = {
    "peft_version": ..., "megatron_config": None, "megatron_core": ..., "trainable_token_indices": None, "eva_config": None,
    "corda_config": None, "lora_ga_config": None, "velora_config": None, "alora_invocation_tokens": None,
    "use_qalora": False, "qalora_group_size": ..., "monteclora_config": None, "layer_replication": None,
    "runtime_config": None, "lora_bias": False, "target_parameters": None, "use_bdlora": None, "arrow_config": None,
    "kasa_config": None, "ensure_weight_tying": False,
}  # fmt: skip


@also_takes(ELSEWHERE)
@dataclass(kw_only=True)
class LoraConfig(LayerConfig):
    """Configuration of LoRA.

    Args:
        r: rank of the update.
        target_modules: module names (endings), a regular expression over whole names, or "all-linear"; None takes the
            family's default.
        exclude_modules: the same, to leave out.
        lora_alpha: numerator of the scale.
        lora_dropout: probability of dropping the update's input in training.
        fan_in_fan_out: accepted for HF PEFT's sake; the layout is read from the module.
        bias: "none", "all" or "lora_only": which biases are trained along.
        use_rslora: scale by lora_alpha / sqrt(r).
        modules_to_save: modules that are trained in full and saved along.
        init_lora_weights: True (B = 0), False (both random), "gaussian", "pissa", "pissa_niter_<n>", "olora", "loftq".
        loftq_config: a `LoftQConfig` or its fields, for "loftq".
        layers_to_transform, layers_pattern: only layers with these numbers (in a module list of that name).
        rank_pattern, alpha_pattern: other ranks and alphas for modules that match a name or regular expression.
        use_dora: train the length of every output row apart from its direction.
    """

    r: Count = 8
    lora_alpha: Number = 8
    lora_dropout: Probability = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    loftq_config: dict[str, Any] | LoftQConfig = field(default_factory=dict)
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, Count] = field(default_factory=dict)
    alpha_pattern: dict[str, Number] = field(default_factory=dict)
    use_dora: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORA
        if self.bias not in ("none", "all", "lora_only"):
            raise ConfigError(f"bias={self.bias!r}: expected 'none', 'all' or 'lora_only'.")
        init = self.init_lora_weights
        if isinstance(init, str):
            self.init_lora_weights = init = init.lower()
            if init not in INITS and not re.fullmatch(r"pissa_niter_\d+", init):
                raise ConfigError(
                    f"init_lora_weights={init!r}: expected True, False, {', '.join(map(repr, INITS))} or "
                    f"'pissa_niter_<n>'{nearest(init, INITS)}"
                )
        self.loftq_config = loftq_fields(self.loftq_config, init)
        for pattern in [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or ():
            check_expressions("layers_pattern", pattern)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern is given without layers_to_transform; name the layers' numbers there.")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ConfigError("layers_to_transform needs target_modules as a list; write the layers into the expression.")


def loftq_fields(given: Any, init: Any) -> dict[str, Any]:
    """The fields of a LoftQ configuration as they are stored; {} unless the start values are LoftQ's.

    Raises:
        ConfigError: other bits than 4 and 8, more than one step, unknown fields.
    """
    if init != "loftq":
        return {}
    values = dict(given or {}) if isinstance(given, dict | None) else dataclasses.asdict(given)  # HF PEFT's object, too
    known = {f.name: f.default for f in dataclasses.fields(LoftQConfig)}
    for key in values.keys() - known.keys():
        raise ConfigError(f"loftq_config has no field {key!r}{nearest(key, known)}; it has {', '.join(known)}.")
    values = known | values
    if values["loftq_bits"] not in (4, 8):
        raise ConfigError(f"loftq_bits={values['loftq_bits']!r}: expected 4 (NF4) or 8 (int8).")
    if values["loftq_iter"] != 1:
        raise ConfigError(
            f"loftq_iter={values['loftq_iter']!r}: expected 1. Further steps quantise the base anew, which adapters share."
        )
    return values


CHANGES = {"embedding": EmbeddingChange, "conv": ConvChange}  # of other kinds of layers than linear ones


class Lora(LayerMethod):
    """One LoRA adapter in a host."""

    title = "LoRA"
    kinds = ("linear", "embedding", "conv", "attention")
    takes = "linear layers (torch's, bitsandbytes', Conv1D), embeddings, convolutions and torch's MultiheadAttention"

    @property
    def bound(self) -> bool:
        return self.config.bias != "none"  # type: ignore[attr-defined]

    def attach(self, host: Site, *, for_loading: bool = False) -> None:
        if self.config.bias != "none":  # type: ignore[attr-defined]
            self._one_bias(host)
        super().attach(host, for_loading=for_loading)
        if self.config.bias != "none":  # type: ignore[attr-defined]
            try:
                host.adapter_biases[self.name] = nn.ParameterDict(
                    {
                        path.replace(".", "/"): module.bias.detach().to(host.adapter_dtype(module), copy=True)
                        for path, module in self._biased(host)
                    }
                )
            except Exception:
                self.detach(host)
                raise

    def change(self, host: Site, path: str, frozen: Frozen) -> Change:
        config: LoraConfig = self.config  # type: ignore[assignment]
        r = pattern_value(config.rank_pattern, path, config.r)
        alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha)
        original = None
        if config.init_lora_weights == "loftq" and frozen.quantized:
            config.__dict__["own_fields"] = LOFTQ_FIELDS
            original = partial(self._original, host, config, path, frozen)
        if frozen.kind == "attention":
            check_dropout(config, path)
        made = CHANGES.get(frozen.kind, LoraChange)(config, r, alpha, original)
        if is_uncalled(frozen.layer):
            made.scaling *= OUT_PROJ
        return made

    def _original(self, host: Site, config: LoraConfig, path: str, frozen: Frozen) -> Tensor:
        """For LoftQ: the weight [out, in] that a quantised layer was made from, out of the base's checkpoint."""
        bits, have = config.loftq_config["loftq_bits"], 4 if frozen.quantized == "4bit" else 8  # type: ignore[index]
        if bits != have:
            raise ConfigError(f"loftq_bits={bits}, but {path!r} holds {have}-bit weights; set loftq_bits={have}.")
        turned = issubclass(source_class(frozen.plain), Conv1D)
        weight = checkpoint_weight(host.base, f"{path}.weight", frozen.shape[::-1] if turned else frozen.shape)
        return weight.T if turned else weight

    def _one_bias(self, host: Site) -> None:
        others = [n for n, m in host.methods.items() if n != self.name and getattr(m.config, "bias", "none") != "none"]
        if others:
            raise ConfigError(f"bias={self.config.bias!r} beside adapter {others[0]!r}, which trains biases too: one can.")  # type: ignore[attr-defined]

    def _biased(self, host: Site) -> Iterator[tuple[str, Any]]:
        """Modules whose bias is trained: the wrapped layers' own, or every one of the base."""
        config: LoraConfig = self.config  # type: ignore[assignment]
        own = {id(layer.frozen.layer) for _, layer in self.layers(host)}
        for path, module in base_modules(host.base):
            if config.bias == "lora_only" and id(module) not in own:
                continue
            attention = isinstance(module, nn.MultiheadAttention)  # it has biases, and adds them within
            if isinstance(module, Adapted) or (module._parameters.get("bias") is None and not attention):
                continue
            if "original_module" in path.split(".") and id(module) not in own:  # another copy of it is trained in full
                continue
            if attention or not isinstance(module, (nn.Linear, Conv1D, nn.LayerNorm, *KINDS["conv"])):
                raise UnsupportedError(
                    f"bias={config.bias!r} would train the bias of {path!r}, a {type(module).__name__}, which may not "
                    "simply be added to its output. Use bias='lora_only' or 'none'."
                )
            yield clean_path(path), module

    def detach(self, host: Site) -> None:
        if self.name in host.adapter_biases:
            del host.adapter_biases[self.name]
        super().detach(host)

    def connect(self, host: Site) -> list[Any]:
        """Add the trained biases, as differences to the base's, to the outputs of their modules."""
        if self.name not in host.adapter_biases:
            return []
        handles = []
        biases: Any = host.adapter_biases[self.name]
        owners = {id(layer.frozen.layer): layer for _, layer in self.layers(host)}
        for path, module in self._biased(host):
            bias = biases[path.replace(".", "/")]
            if id(module) in owners:
                owners[id(module)].biases[self.name] = bias

            axes = module.weight.dim() - 2 if isinstance(module, KINDS["conv"]) else 0  # behind the channels

            def add(module: Any, args: Any, output: Tensor, bias: Tensor = bias, axes: int = axes) -> Tensor:
                if self.name not in host.active_now():
                    return output
                change = (bias - as_it_was(module).bias).to(output.dtype)[(..., *[None] * axes)]
                if (routes := host.routes_now()) is None:
                    return output + change
                return by_group(routes, output, lambda group, at: output[at] + change if self.name in group else None)

            handles += [form.register_forward_hook(add) for form in both_forms(module)]
        return handles

    def named_parameters(self, host: Site) -> Iterator[tuple[str, nn.Parameter]]:
        yield from super().named_parameters(host)
        if self.name in host.adapter_biases:
            for key, parameter in host.adapter_biases[self.name].items():
                yield f"adapter_biases.{self.name}.{key}", parameter

    def file_parameters(self, host: Site) -> Iterator[tuple[str, nn.Parameter]]:
        yield from super().file_parameters(host)
        if self.name in host.adapter_biases:
            own = {path for path, _ in self.layers(host)}
            for key, parameter in host.adapter_biases[self.name].items():
                path = key.replace("/", ".")
                yield f"{self.file_prefix}{path}{'.base_layer' if path in own else ''}.bias", parameter


register(PeftType.LORA, LoraConfig, Lora)
