"""Another LoRA adapter's weights in an attached one's place, under its name: `hotswap_adapter`.

Tensors are filled in place, so that a compiled model runs on as it is. For that ranks must not grow and scales must be
tensors, not numbers in the code: `prepare_model_for_compiled_hotswap` pads the one and makes the other, before compiling.
"""

from __future__ import annotations

import os
import re
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from . import fingerprint
from .checkpoint import load_options, load_peft_weights
from .checkpoint.fit import normalise
from .errors import AdapterError, CheckpointError, ConfigError, nearest
from .files import WEIGHTS_NAME, find_file, header_of
from .injecting import adapters_of
from .layers import Adapted
from .methods import LoraConfig, PeftConfig
from .methods.lora_change import EmbeddingChange, LoraChange
from .methods.lora_conv import ConvChange
from .methods.lora_experts import ExpertsChange
from .methods.lora_init import from_weight
from .methods.targets import pattern_value

# Fields that must be alike, because they say what is computed beyond tensors, ranks and scales.
ALIKE = (
    "use_rslora", "lora_dropout", "alpha_pattern", "use_dora", "bias", "lora_bias", "alora_invocation_tokens",
    "target_parameters", "layer_replication", "modules_to_save",
)  # fmt: skip

PADDED = (LoraChange, ConvChange, EmbeddingChange, ExpertsChange)  # others have factors of those, or none


def hotswap_adapter(
    model: Any, model_name_or_path: str | os.PathLike, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Fill an attached LoRA adapter with a saved one's tensors and scales. Layers that the saved one lacks change nothing.

    Args:
        model: a `PeftModel`, compiled or not.
        torch_device: HF PEFT's; without meaning here (tensors go where the adapter is).
        kwargs: as for `PeftModel.from_pretrained`.

    Raises:
        AdapterError: an unknown adapter, or one that is merged.
        ConfigError: the two compute differently, or a rank is too large for a prepared model.
        CheckpointError: the file has tensors that the attached adapter has no place for. Nothing is changed then.
    """
    host = adapters_of(model)
    host._known(adapter_name)
    options = load_options(dict(kwargs))
    config: Any = PeftConfig.from_pretrained(model_name_or_path, **options.hub)
    check_hotswap_configs_compatible(host.peft_config[adapter_name], config)
    path = find_file(model_name_or_path, WEIGHTS_NAME, required=False, **options.hub)
    header = header_of(path) if path else {}
    fingerprint.check(host.base, header.get("base"), str(model_name_or_path), options.allow_base_mismatch)
    state = load_peft_weights(model_name_or_path, **kwargs)
    hotswap_adapter_from_state_dict(host, state, adapter_name, config)


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """ConfigError unless an adapter of one configuration can take the place of one of the other."""
    if config0.peft_type != config1.peft_type:
        kinds = [getattr(c.peft_type, "value", c.peft_type) for c in (config0, config1)]
        raise ConfigError(f"Incompatible PEFT types found: {kinds[0]} and {kinds[1]}.")
    if not isinstance(config0, LoraConfig) or not isinstance(config1, LoraConfig):
        kind = getattr(config0.peft_type, "value", config0.peft_type)
        raise ConfigError(f"Hotswapping only supports LORA, but {kind} was passed. Load the adapter under a new name.")
    for name in ALIKE:
        old, new = getattr(config0, name), getattr(config1, name)
        if old != new:
            raise ConfigError(
                f"Configs are incompatible: for {name}, {old!r} != {new!r}. Load the adapter under a new name."
            )
    for config in (config0, config1):
        if from_weight(config.init_lora_weights) or config.init_lora_weights in ("corda", "lora_ga"):
            raise ConfigError(
                f"init_lora_weights={config.init_lora_weights!r}: such an adapter is taken against start values of its own, "
                "which hotswapping does not exchange. Load the adapter under a new name."
            )


def hotswap_adapter_from_state_dict(
    model: Any, state_dict: dict[str, Tensor], adapter_name: str, config: LoraConfig, parameter_prefix: str = "lora_"
) -> None:
    """The same from tensors under the keys of a file, and the configuration that they belong to."""
    host = adapters_of(model)
    host._known(adapter_name)
    method: Any = host.methods[adapter_name]
    layers = dict(method.layers(host))
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise AdapterError(
            f"Cannot hot-swap adapter {adapter_name!r} because it is merged into the base's weights; call "
            "unmerge_adapter() first."
        )
    own = dict(method.file_parameters(host))
    wanted = {key: value.shape for key, value in own.items()}
    found = {normalise(key, adapter_name, wanted, method.file_prefix): value for key, value in state_dict.items()}
    unexpected = sorted(key for key in found if key not in own and parameter_prefix in key)
    if unexpected:
        raise CheckpointError(
            f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(unexpected)}"
            + nearest(unexpected[0], own)
            + ". The attached adapter has no place for them; nothing was changed."
        )
    if fixed := sorted(key for key in found if key not in own):
        raise CheckpointError(f"Hot swapping exchanges LoRA's tensors only; this adapter brings {', '.join(fixed)} as well.")
    for path, layer in layers.items():
        check_room(path, layer, adapter_name, {k: v for k, v in found.items() if under(method.file_prefix + path, k)})
    with torch.no_grad():
        blocks = {id(factors_of(layer, adapter_name)[0]): blocks_of(layer, adapter_name) for layer in layers.values()}
        for key, parameter in own.items():
            fill(parameter, found.get(key), blocks.get(id(parameter), 1))
        power, common, idle = 0.5 if config.use_rslora else 1, 0.0, []
        for path, layer in layers.items():
            change: Any = layer.changes[adapter_name]
            rank = len(factors_of(layer, adapter_name)[0]) // getattr(change, "experts", 1)
            if not any(under(method.file_prefix + path, key) for key in found):
                idle.append((change, rank))
                continue
            scale = pattern_value(config.alpha_pattern, path, config.lora_alpha)
            scale /= pattern_value(config.rank_pattern, path, config.r) ** power
            change.rescale(rank, scale)
            common = common or scale * rank**power
        for change, rank in idle:  # zero, whatever the scale: no entry of alpha_pattern
            change.rescale(rank, common / rank**power)
    describe(host.peft_config[adapter_name], {p: layer.changes[adapter_name] for p, layer in layers.items()})


def under(path: str, key: str) -> bool:
    """Whether a key is of one of a module's own tables."""
    return re.fullmatch(re.escape(path) + r"\.lora_\w+(\.\w+)?", key) is not None


def check_room(path: str, layer: Adapted, name: str, tensors: dict[str, Tensor]) -> None:
    """ConfigError where a prepared layer's padded rank is below that of the new tensors."""
    change: Any = layer.changes[name]
    a, b = factors_of(layer, name)
    for key, tensor in tensors.items():
        if isinstance(change.scaling, Tensor) and re.search(r"\.lora_(embedding_)?A\b", key) and len(tensor) > len(a):
            experts = getattr(change, "experts", 1)
            raise ConfigError(
                f"{path!r} was prepared for rank {len(a) // experts}, the new adapter has {len(tensor) // experts}: call "
                "prepare_model_for_compiled_hotswap with the largest target_rank, before compiling."
            )
        fits = tensor.shape in (a.shape, b.shape) or tensor.dim() == 1
        if not fits and tensor.dim() == 2 and tensor.shape[1] != a.shape[1] and tensor.shape[0] != b.shape[0]:
            raise CheckpointError(
                f"{path!r}: a tensor {tuple(tensor.shape)} fits neither A {tuple(a.shape)} nor B {tuple(b.shape)}."
            )


def factors_of(layer: Adapted, name: str) -> tuple[Tensor, Tensor]:
    change: Any = layer.changes[name]
    return change.factors(layer.held(name))


def groups_of(layer: Adapted, name: str) -> int:
    """In how many groups a layer's convolution reads the channels that A makes."""
    return getattr(layer.changes[name], "groups", 1)


def blocks_of(layer: Adapted, name: str) -> int:
    """In how many blocks A's rows come: a convolution's groups, stacked experts."""
    return getattr(layer.changes[name], "experts", groups_of(layer, name))


def padded(a: Tensor, rows: int, blocks: int) -> Tensor:
    """A [r, ...] with rows of zeros up to a number of rows, behind those of each block."""
    own = a.unflatten(0, (blocks, -1))
    zeros = own.new_zeros(blocks, rows // blocks - own.shape[1], *own.shape[2:])
    return torch.cat([own, zeros], 1).flatten(0, 1)


def fill(parameter: nn.Parameter, value: Tensor | None, blocks: int = 1) -> None:
    """A parameter's new value, in place: zeros for none, and where the new rank is smaller. A larger one makes it grow.

    Args:
        blocks: of an A, in how many its rows come.
    """
    if value is None:
        parameter.zero_()
        return
    value = value.to(parameter.device, parameter.dtype)
    if any(new > old for new, old in zip(value.shape, parameter.shape, strict=True)):
        parameter.data = value.clone()
        return
    if value.shape != parameter.shape:
        value = padded(value, len(parameter), blocks) if blocks > 1 else value
        parameter.zero_()
    parameter[tuple(slice(n) for n in value.shape)].copy_(value)


def describe(config: Any, changes: dict[str, Any]) -> None:
    """Let a configuration say the ranks and scales that its layers have now, so that the adapter can be saved."""
    config.r = next(iter(changes.values())).r
    config.rank_pattern = {re.escape(path): c.r for path, c in changes.items() if c.r != config.r}
    alphas = {path: float(c.scaling) * (c.r**0.5 if config.use_rslora else c.r) for path, c in changes.items()}
    config.lora_alpha = next(iter(alphas.values()))
    config.alpha_pattern = {re.escape(p): a for p, a in alphas.items() if abs(a - config.lora_alpha) > 1e-6 * abs(a)}


def prepare_model_for_compiled_hotswap(
    model: Any, *, target_rank: int | None = None, config: Any = None, check_compiled: str = "error"
) -> None:
    """Make a model with LoRA adapters ready for `hotswap_adapter` without a recompile. Call it before `torch.compile`.

    Args:
        target_rank: the largest rank of all adapters to come; factors are padded to it with zeros.
        config: HF PEFT's; the model's own configurations are always kept in step.
        check_compiled: what to do where the model is compiled already: "error", "warn" or "ignore".

    Raises:
        ConfigError: the model is compiled already; a rank is above `target_rank`.
        AdapterError: there are no LoRA layers.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ConfigError(f"check_compiled={check_compiled!r}: expected 'error', 'warn' or 'ignore'.")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None):
        text = "prepare_model_for_compiled_hotswap comes before torch.compile"
        if check_compiled == "error":
            raise ConfigError(f"Call prepare_model_for_compiled_hotswap *before* compiling the model: {text}.")
        if check_compiled == "warn":
            warnings.warn(f"{text}; the already compiled model will be compiled again.", stacklevel=2)
    host = adapters_of(model)
    names = [n for n, c in host.peft_config.items() if isinstance(c, LoraConfig)]
    places = [(n, p, layer) for n in names for p, layer in host.methods[n].layers(host)]  # type: ignore[attr-defined]
    if not places:
        raise AdapterError("No adapter layers found on the model: prepare it after the first LoRA adapter is loaded.")
    for name, path, layer in places:
        change: Any = layer.changes[name]
        if target_rank is not None and change.r > target_rank:
            raise ConfigError(
                f"Trying to pad the adapter to the target rank {target_rank}, but the original rank is larger ({change.r}), "
                f"in {path!r}. This is not possible."
            )
        if target_rank is not None and target_rank % groups_of(layer, name):
            raise ConfigError(
                f"target_rank={target_rank} on {path!r}, a convolution of {groups_of(layer, name)} groups: expected a rank "
                "that they divide."
            )
    for name, _, layer in places:
        pad(layer, name, target_rank if type(layer.changes[name]) in PADDED else None)
    for name in names:
        layers = host.methods[name].layers(host)  # type: ignore[attr-defined]
        describe(host.peft_config[name], {p: layer.changes[name] for p, layer in layers})


def pad(layer: Adapted, name: str, rank: int | None) -> None:
    """Zeros up to a rank, and the scale as a tensor."""
    change: Any = layer.changes[name]
    a, b = factors_of(layer, name)
    experts = getattr(change, "experts", 1)
    if rank is not None:
        rows = rank * experts
        a.data = padded(a, rows, blocks_of(layer, name))
        b.data = torch.cat([b, b.new_zeros(len(b), rows // groups_of(layer, name) - b.shape[1], *b.shape[2:])], 1)
    change.rescale(len(a) // experts, torch.tensor(float(change.scaling), device=a.device))
