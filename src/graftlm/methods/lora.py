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
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ..architectures import is_encoder_decoder, model_type
from ..errors import ConfigError, UnsupportedError, nearest
from ..files import checkpoint_weight
from ..layers import Adapted, Change, Frozen
from ..quantization import source_class
from .base import PeftType, Site, register
from .biased import Biased
from .fields import Count, Number, Probability, also_takes, check_expressions
from .layered import LayerConfig, check_rank
from .lora_change import EmbeddingChange, LoraChange
from .lora_conv import OUT_PROJ, ConvChange, check_dropout
from .lora_data_config import KEPT, CordaConfig, EvaConfig, LoraGAConfig, check_data_start
from .lora_data_init import doubled, take_starts, with_starts, without_starts
from .lora_experts import ExpertsChange, adapted_parameter, check_settings, find_parameters
from .lora_init import from_weight
from .lora_invoked import check_invocation
from .lora_replicated import release, replicate
from .lora_tied import TiedChange, tie_head, tie_targets
from .targets import is_uncalled, pattern_value, unused_patterns
from .tokens import lora_tokens, repeated_tokens

INITS = ("gaussian", "orthogonal", "pissa", "olora", "loftq", "eva", "corda", "lora_ga")
# On a quantised base LoftQ's adapter is like any other; HF PEFT, told of the start, would quantise the base anew to load it.
LOFTQ_FIELDS = frozenset({"init_lora_weights", "loftq_config"})


@dataclass(kw_only=True)
class LoftQConfig:
    """How LoftQ's start values are made: bits of the quantised base (4: NF4, 8: int8) and steps (1; see `lora_init`)."""

    loftq_bits: int = 4
    loftq_iter: int = 1


# Fields of HF PEFT's LoraConfig that are not here, with their neutral values.
ELSEWHERE = {
    "peft_version": ..., "megatron_config": None, "megatron_core": ..., "velora_config": None,
    "use_qalora": False, "qalora_group_size": ..., "monteclora_config": None,
    "runtime_config": None, "use_bdlora": None, "arrow_config": None,
    "kasa_config": None,
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
        init_lora_weights: True (B = 0), False (both random), "gaussian", "orthogonal", "pissa", "pissa_niter_<n>", "olora",
            "loftq", "eva", "corda", "lora_ga".
        loftq_config: a `LoftQConfig` or its fields, for "loftq".
        layers_to_transform, layers_pattern: only layers with these numbers (in a module list of that name).
        rank_pattern, alpha_pattern: other ranks and alphas for modules that match a name or regular expression.
        use_dora: train the length of every output row apart from its direction.
        lora_bias: give B a bias of its own.
        target_parameters: parameters (endings of their dotted names) that are changed beside the layers of `target_modules`,
            stacked experts above all: see `lora_experts`.
        eva_config, corda_config, lora_ga_config: how starts from data are made (see `lora_eva`, `lora_data_init`).
        layer_replication: pairs [from, up to]: the base's blocks in another order and number (see `lora_replicated`).
        ensure_weight_tying: keep an adapter of tied embeddings and head tied (see `lora_tied`).
        alora_invocation_tokens: token ids; in each row the adapter acts from their last occurrence on (aLoRA).
        trainable_token_indices: tokens whose rows are trained along (see `tokens`): of the input embeddings and what is tied
            to them, or by names of modules.
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
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    alora_invocation_tokens: list[int] | None = None
    layer_replication: list[list[int]] | None = None
    ensure_weight_tying: bool = False
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    eva_config: EvaConfig | dict[str, Any] | None = None
    corda_config: CordaConfig | dict[str, Any] | None = None
    lora_ga_config: LoraGAConfig | dict[str, Any] | None = None

    own_biases: ClassVar[str] = "lora_only"

    def __post_init__(self) -> None:
        if isinstance(self.layer_replication, (list, tuple)):
            self.layer_replication = [list(p) if isinstance(p, tuple) else p for p in self.layer_replication]
        super().__post_init__()
        self.peft_type = PeftType.LORA
        if self.layer_replication is not None and not all(len(pair) == 2 for pair in self.layer_replication):
            raise ConfigError(f"layer_replication={self.layer_replication!r}: expected pairs [from, up to] of blocks.")
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
        if self.lora_bias and (self.use_dora or isinstance(init, str)):
            other = "use_dora=True" if self.use_dora else f"init_lora_weights={init!r}"
            raise ConfigError(f"lora_bias=True does not go with {other}: it is for plain LoRA, started by True or False.")
        check_settings(self)
        check_invocation(self)
        check_data_start(self)
        self.loftq_config = loftq_fields(self.loftq_config, init)
        for pattern in [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or ():
            check_expressions("layers_pattern", pattern)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern is given without layers_to_transform; name the layers' numbers there.")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ConfigError("layers_to_transform needs target_modules as a list; write the layers into the expression.")

    def save_pretrained(
        self, save_directory: str | os.PathLike, auto_mapping_dict: dict | None = None, **overrides: Any
    ) -> None:
        """As ever; of an adapter whose file holds its start beside it, what the file holds."""
        overrides = doubled(self) | overrides if self.init_lora_weights in KEPT else overrides
        super().save_pretrained(save_directory, auto_mapping_dict, **overrides)


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


class Lora(Biased):
    """One LoRA adapter in a host."""

    title = "LoRA"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "embedding", "conv", "attention")
    ranked: ClassVar[bool] = True
    takes = "linear layers (torch's, bitsandbytes', Conv1D), embeddings, convolutions and torch's MultiheadAttention"

    @property
    def bound(self) -> bool:
        return super().bound or self.invocation is not None

    def attach(self, host: Site, *, for_loading: bool = False) -> None:
        if self.invocation and is_encoder_decoder(host.base):
            raise UnsupportedError(
                "alora_invocation_tokens is for decoder-only models, which read a row from left to right."
            )
        super().attach(host, for_loading=for_loading)
        lora_tokens(self, host, initialise=not for_loading)
        host.switch.waiting |= {self.name} if self.invocation else set()
        if self.config.lora_bias and (without := self._without_bias(host)):  # type: ignore[attr-defined]
            warnings.warn(f"lora_bias=True: {without} has no bias, so this adapter cannot be merged.", stacklevel=2)

    def attach_layers(self, host: Site, *, for_loading: bool) -> None:
        config: LoraConfig = self.config  # type: ignore[assignment]
        if config.layer_replication:
            replicate(host, self, config.layer_replication)
        if config.target_modules is None and config.target_parameters:
            config.target_modules = list(self.families.get(model_type(host.base), []))
        pair = tie_targets(host, self.name, config)
        if not config.target_parameters:
            super().attach_layers(host, for_loading=for_loading)
        else:
            self._attach_parameters(host, for_loading)
        if pair is not None:
            tie_head(host, self.name, config, pair, self._rank(pair[0]), host.adapter_dtype())

    def _attach_parameters(self, host: Site, for_loading: bool) -> None:
        """With `target_parameters`: those, and the layers that are named beside them."""
        config: LoraConfig = self.config  # type: ignore[assignment]
        if config.target_modules:
            super().attach_layers(host, for_loading=for_loading)
        names = [path for path, _ in super().layers(host)]
        for full, path, name in find_parameters(host.base, config):
            names.append(full)
            layer, (r, alpha) = adapted_parameter(host, path, name), self._rank(full)
            if not for_loading:
                check_rank(r, full, "parameter", layer.frozen.shape[-2:])
            dtype = host.adapter_dtype(SimpleNamespace(weight=layer.frozen.original))
            layer.add(self.name, ExpertsChange(config, r, alpha), dtype, initialise=not for_loading)
        if unused := unused_patterns(config, names, sorted({name.rpartition(".")[2] for name in names})):
            text = f"These entries select none of the targets and have no effect: {', '.join(unused)}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def layers(self, host: Site) -> Iterator[tuple[str, Adapted]]:
        """This adapter's layers with their dotted names in the bare base; of several parameters of one module, as in HF
        PEFT's files, the last by that name and each earlier one as the `base_layer` of the next."""
        grouped: dict[str, list[Adapted]] = {}
        for path, layer in super().layers(host):
            grouped.setdefault(path, []).append(layer)
        for path, layers in grouped.items():
            if len(layers) > 1:
                layers.sort(key=lambda layer: -layer.place)
            for depth, layer in enumerate(layers):
                yield path + ".base_layer" * depth, layer

    def _rank(self, path: str) -> tuple[int, float]:
        """Rank and alpha of a layer."""
        config: LoraConfig = self.config  # type: ignore[assignment]
        return pattern_value(config.rank_pattern, path, config.r), pattern_value(
            config.alpha_pattern, path, config.lora_alpha
        )

    def repeated_keys(self, host: Site) -> dict[str, str]:
        return repeated_tokens(self, host)

    def change(self, host: Site, path: str, frozen: Frozen) -> Change:
        config: LoraConfig = self.config  # type: ignore[assignment]
        original = None
        if config.init_lora_weights == "loftq" and frozen.quantized:
            config.__dict__["own_fields"] = LOFTQ_FIELDS
            original = partial(self._original, host, config, path, frozen)
        if frozen.kind == "attention":
            check_dropout(config, path)
        made = CHANGES.get(frozen.kind, LoraChange)(config, *self._rank(path), original)
        if is_uncalled(frozen.layer):
            made.scaling *= OUT_PROJ
        return made

    @property
    def invocation(self) -> list[int] | None:
        return self.config.alora_invocation_tokens  # type: ignore[attr-defined]

    def refuse_merge(self, host: Site) -> None:
        if self.invocation:
            raise UnsupportedError(
                f"Adapter {self.name!r} acts from its alora_invocation_tokens on, not on every token, so it cannot be "
                "merged. Keep it attached."
            )
        if self.config.layer_replication:  # type: ignore[attr-defined]
            raise UnsupportedError(
                f"Adapter {self.name!r} has layer_replication: blocks share their weights, which can hold one update only. "
                "Keep it attached."
            )
        if self.config.lora_bias and (without := self._without_bias(host)):  # type: ignore[attr-defined]
            raise UnsupportedError(
                f"Adapter {self.name!r} has lora_bias=True, but {without} has no bias that it could be merged into. Keep it "
                "attached."
            )

    def _without_bias(self, host: Site) -> str:
        """The first of this adapter's layers without a bias, and how many more; "" for none."""
        paths = [path for path, layer in self.layers(host) if layer.frozen.bias is None]
        return f"{paths[0]!r}" + (f" (and {len(paths) - 1} more)" if len(paths) > 1 else "") if paths else ""

    def _original(self, host: Site, config: LoraConfig, path: str, frozen: Frozen) -> Tensor:
        """For LoftQ: the weight [out, in] that a quantised layer was made from, out of the base's checkpoint."""
        bits, have = config.loftq_config["loftq_bits"], 4 if frozen.quantized == "4bit" else 8  # type: ignore[index]
        if bits != have:
            raise ConfigError(f"loftq_bits={bits}, but {path!r} holds {have}-bit weights; set loftq_bits={have}.")
        turned = issubclass(source_class(frozen.plain), Conv1D)
        weight = checkpoint_weight(host.base, f"{path}.weight", frozen.shape[::-1] if turned else frozen.shape)
        return weight.T if turned else weight

    def detach(self, host: Site) -> None:
        host.switch.waiting.discard(self.name)
        super().detach(host)
        release(host, self)

    def tensors(self, host: Site) -> dict[str, Tensor]:
        return with_starts(super().tensors(host), self._starts(host))

    def load(self, host: Site, tensors: dict[str, Tensor]) -> None:
        super().load(host, take_starts(tensors, self._starts(host)))

    def completed(self, host: Site, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return without_starts(super().completed(host, tensors), self._starts(host))

    def file_fields(self, host: Site) -> dict[str, Any]:
        said = self.config.init_lora_weights in KEPT  # type: ignore[attr-defined]
        return {} if said or not self._starts(host) else doubled(self.config)

    @contextmanager
    def as_plain(self, host: Site) -> Iterator[None]:
        config: LoraConfig = self.config  # type: ignore[assignment]
        before, config.init_lora_weights = config.init_lora_weights, True
        try:
            if not self._starts(host):
                super().as_plain(host)
            yield
        finally:
            config.init_lora_weights = before

    def _starts(self, host: Site) -> dict[str, Any]:
        """Starts that are in the file, by the name of their layer there: all but those that its configuration lets find
        again from the base (also where somebody has changed it since, as HF PEFT's users do before a conversion)."""
        if from_weight(self.config.init_lora_weights):  # type: ignore[attr-defined]
            return {}
        held = {f"{self.file_prefix}{path}": layer.held(self.name) for path, layer in self.layers(host)}
        return {path: t["lora_start"] for path, t in held.items() if "lora_start" in t}

    def file_parameters(self, host: Site) -> Iterator[tuple[str, Any]]:
        yield from super().file_parameters(host)
        for path, layer in self.layers(host):
            if isinstance(change := layer.changes[self.name], TiedChange):
                for key, factor in zip(change.keys, change.factors(layer.held(self.name)), strict=True):
                    yield f"{self.file_prefix}{path}.{key}", factor


register(PeftType.LORA, LoraConfig, Lora)
