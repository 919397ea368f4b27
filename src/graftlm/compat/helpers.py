"""Functions of `peft.utils`, `peft.helpers` and `peft.functional`."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import base_modules, clean_path
from ..errors import CheckpointError, ConfigError, GraftError
from ..injecting import adapters_of
from ..layers import Adapted
from ..merging import unmerge
from ..methods import PeftConfig
from ..methods.ia3 import TARGETS as IA3_TARGETS
from ..methods.targets import lets_in, matches
from ..status import layer_status, model_status
from .tuners import TUNERS, wrappers_of

UPCAST_DTYPES = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
IA3_FEEDFORWARD = {family: names[-1:] for family, names in IA3_TARGETS.items()}


def infer_device() -> str:
    """The kind of accelerator that torch sees here, or "cpu"."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else found.type


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Frozen parameters in `dtype`, trained ones in fp32, for mixed precision training. Packed integers stay as they are."""
    if dtype not in (torch.float16, torch.bfloat16):
        raise ConfigError(f"dtype={dtype}: expected torch.float16 or torch.bfloat16.")
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def get_layer_status(model: nn.Module) -> list[Any]:
    """One entry an adapted place: what is attached, active, merged and trainable there."""
    return layer_status(adapters_of(model))


def get_model_status(model: nn.Module) -> Any:
    """The same for the model as a whole."""
    return model_status(adapters_of(model))


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether there is an adapter's configuration that can be read."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except (GraftError, OSError):
        return False
    return True


def shift_tokens_right(input_ids: Tensor, pad_token_id: int | None, decoder_start_token_id: int) -> Tensor:
    """A decoder's inputs [B, T] out of its labels [B, T]: one to the right behind the start token; -100 becomes padding."""
    if pad_token_id is None:
        raise ConfigError("The model's configuration has no pad_token_id.")
    start = input_ids.new_full((input_ids.shape[0], 1), decoder_start_token_id)
    shifted = torch.cat([start, input_ids[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """The weight as [out, in], where it is kept as [in, out]; a parameter stays one."""
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """A module's parent, itself, and its name there."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def batch_size(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    """Rows of whichever is given."""
    given = inputs_embeds if input_ids is None else input_ids
    if given is None:
        raise ConfigError("Neither input_ids nor inputs_embeds is given.")
    return given.shape[0]


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """What two tensors have in common that share their memory."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def get_base_model_state_dict(model: Any) -> dict[str, Tensor]:
    """The base's state under its own keys, without adapters."""
    base = adapters_of(model).base
    state = base.state_dict()
    return {own: state[key] for own, key in base_keys(base).items()}


def base_keys(base: nn.Module) -> dict[str, str]:
    """Keys of a base without its adapters, and the same tensors' keys with them."""
    found = {}
    state = base.state_dict()
    for path, module in base_modules(base):
        if isinstance(module, Adapted) or hasattr(module, "original_module"):
            continue
        tensors = [*module._parameters, *(b for b in module._buffers if b not in module._non_persistent_buffers_set)]
        for name in tensors:
            key = f"{path}.{name}" if path else name
            if key in state:
                found[f"{clean_path(path)}.{name}" if path else name] = key
    return found


def set_base_model_state_dict(model: Any, state_dict: dict[str, Tensor], strict: bool = True) -> Any:
    """Load a state of the bare base into the base of a wrapper.

    Raises:
        CheckpointError: under `strict` keys that are missing or unknown, each named; nothing was loaded.
    """
    host = adapters_of(model)
    keys = base_keys(host.base)
    missing, unexpected = sorted(keys.keys() - state_dict.keys()), sorted(state_dict.keys() - keys.keys())
    if strict and (missing or unexpected):
        raise CheckpointError(
            f"The state does not fit the base; nothing was loaded. Missing: {', '.join(missing) or 'none'}. "
            f"Unexpected: {', '.join(unexpected) or 'none'}."
        )
    unmerge(host)
    host.base.load_state_dict({keys[k]: v for k, v in state_dict.items() if k in keys}, strict=False)
    return nn.modules.module._IncompatibleKeys(missing, unexpected)


def check_target_module_exists(config: Any, key: str) -> bool:
    """Whether a configuration means the module of this dotted name (`"all-linear"` is no name here: it needs the model)."""
    return matches(config.target_modules, key) and lets_in(config, config.target_modules, key)


def inspect_matched_modules(tuner: Any, adapter_name: str = "default") -> dict[str, list[str]]:
    """The dotted names of a base's modules, as `"matched"` by an adapter's configuration and `"unmatched"`."""
    host = next(iter(wrappers_of(tuner)), None) or adapters_of(tuner)
    config = host.peft_config[adapter_name]
    names = dict.fromkeys(clean_path(path) for path, _ in base_modules(host.base))
    found: dict[str, list[str]] = {"matched": [], "unmatched": []}
    for name in names:
        found["matched" if check_target_module_exists(config, name) else "unmatched"].append(name)
    return found


def build_peft_weight_mapping(conversions: list[Any] | None, adapter_name: str, peft_config: Any = None) -> list[Any]:
    """The renamings by which transformers' `model.load_adapter` finds an adapter file's tensors in the model: keys lose HF
    PEFT's first levels and get the adapter's name behind its tables (`lora_A.weight` -> `lora_A.default.weight`); then those
    of the model's own checkpoints."""
    from transformers.core_model_loading import WeightRenaming

    if not conversions:
        return []
    peft_type = getattr(peft_config, "peft_type", None)
    prefixes = [TUNERS[peft_type].prefix] if peft_type in TUNERS else [tuner.prefix for tuner in TUNERS.values()]
    levels = [WeightRenaming("base_model.model.model.", "model."), WeightRenaming("base_model.model.", "")]
    named = [WeightRenaming(rf"({re.escape(prefix)}[^\.]*)", rf"\1.{adapter_name}") for prefix in prefixes]
    return [*levels, *named, *(c for c in conversions if isinstance(c, WeightRenaming))]
