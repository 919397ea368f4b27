"""Adapter directories, read: into an attached adapter, after every check has passed."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .. import fingerprint
from ..adapters import AdapterSet
from ..errors import AdapterError, CheckpointError
from ..files import PICKLE_NAME, WEIGHTS_NAME, find_file, header_of, hub_options
from ..layers import saved_modules
from ..merging import unmerge
from ..methods import PeftConfig
from ..methods.fields import refuse_switched_on
from .fit import checked, restore_embeddings
from .write import TRAINING_NAME


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How to read an adapter.

    Attributes:
        hub: which hub file (revision, cache_dir, token, subfolder, …).
        allow_pickle: read an `adapter_model.bin` (with `weights_only=True`) where there is no safetensors file.
        allow_base_mismatch: attach although the fingerprint says another base.
        dtype: the precision that the base is thought to have; another one is refused.
    """

    hub: dict[str, Any] = field(default_factory=dict)
    allow_pickle: bool = False
    allow_base_mismatch: bool = False
    dtype: Any = None


# Arguments of HF PEFT's loading that need nothing here: tensors go where the base model is.
PASSED_OVER = (
    "device_map", "torch_device", "max_memory", "offload_folder", "offload_dir", "offload_index", "offload_buffers",
    "low_cpu_mem_usage", "ephemeral_gpu_offload", "resume_download", "use_safetensors",
)  # fmt: skip
# Those that must be as they are by default.
NOT_LOADED = {"key_mapping": None, "ignore_mismatched_sizes": False}


def load_options(kwargs: dict[str, Any]) -> LoadOptions:
    """Split the keyword arguments of `from_pretrained` and `load_adapter`.

    Raises:
        UnsupportedError: an option of HF PEFT's that is not here. TypeError: an unknown one.
    """
    hub = hub_options(kwargs)
    own = {k: bool(kwargs.pop(k)) for k in ("allow_pickle", "allow_base_mismatch") if k in kwargs}
    dtypes = [kwargs.pop(k) for k in ("torch_dtype", "dtype") if k in kwargs]
    if kwargs.get("ignore_mismatched_sizes"):
        raise CheckpointError("ignore_mismatched_sizes would leave tensors untrained; load the adapter on the base it fits.")
    refuse_switched_on("Loading an adapter", {k: kwargs.pop(k) for k in NOT_LOADED if k in kwargs}, NOT_LOADED)
    unknown = [k for k in kwargs if k not in PASSED_OVER]
    if unknown:
        raise TypeError(f"unexpected keyword arguments {unknown}")
    return LoadOptions(hub=hub, dtype=next((d for d in dtypes if d is not None), None), **own)


def check_dtype(host: AdapterSet, dtype: Any) -> None:
    """A warning for a dtype that would have to change the base: HF PEFT passes it over."""
    base = str(host._float_dtype()).removeprefix("torch.")
    if dtype is not None and str(dtype).removeprefix("torch.") not in ("auto", base):
        warnings.warn(
            f"torch_dtype={dtype} changes nothing here: an adapter takes its precision from the base, which is in {base}. "
            f"Load the base with dtype={dtype}, or leave it out.",
            stacklevel=3,
        )


def config_for(source: str | os.PathLike, config: PeftConfig | None, trainable: bool, hub: dict[str, Any]) -> PeftConfig:
    """The configuration to attach with: the directory's (or the one given), for training or for use only."""
    config = config if config is not None else PeftConfig.from_pretrained(source, **hub)
    config.inference_mode = not trainable
    return config


# Fields that say nothing about what an attached adapter computes.
NEUTRAL = frozenset(
    {"inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "task_type", "lora_dropout", "dropout"}
    | {"encoder_dropout", "tokenizer_name_or_path", "tokenizer_kwargs", "init_weights", "init_text", "fan_in_fan_out"}
    | {"prompt_tuning_init", "prompt_tuning_init_text", "target_modules", "exclude_modules", "modules_to_save"}
)  # which modules: the files' keys are checked


def check_same(config: PeftConfig, source: str | os.PathLike, name: str, hub: dict[str, Any]) -> None:
    """AdapterError where a directory's adapter computes otherwise than the one attached under its name."""
    stored, own = PeftConfig.from_pretrained(source, **hub).to_dict(), config.to_dict()
    neutral = NEUTRAL | config.neutral_fields
    different = [k for k in own if k not in neutral and own[k] != stored.get(k)]
    if different:
        listed = ", ".join(f"{k}={stored.get(k)!r} (attached: {own[k]!r})" for k in different)
        raise AdapterError(f"{source} does not fit the attached adapter {name!r}: {listed}. Load it under another name.")


def fill(host: AdapterSet, source: str | os.PathLike, name: str, options: LoadOptions) -> None:
    """Read a directory's tensors into the attached adapter `name`, after every check has passed."""
    check_dtype(host, options.dtype)
    path = find_file(source, WEIGHTS_NAME, required=False, **options.hub)
    tensors = read_tensors(path) if path else read_pickle(source, options)
    header = header_of(path) if path else {}
    fingerprint.check(host.base, header.get("base"), str(source), options.allow_base_mismatch)
    method = host.methods[name]
    found = checked(host, name, tensors, str(source))
    assign(host, name, found)
    restore_embeddings(host, found, str(source))
    if method.config.inference_mode:
        return
    training = find_file(source, TRAINING_NAME, required=False, **options.hub)
    if training is not None:
        load_training(host, name, read_tensors(training))
    elif getattr(method, "reparameterised", False):
        print(
            f"{source}: the network behind this soft prompt was not saved ({TRAINING_NAME} is missing); "
            "training goes on with its virtual tokens directly."
        )


def load_training(host: AdapterSet, name: str, tensors: dict[str, Tensor]) -> None:
    """Read a training-state file: the method's tensors, and the modules to save under their file keys."""
    method = host.methods[name]
    modules = {k: v for k, v in tensors.items() if k.startswith(method.file_prefix)}
    method.load_training(host, {k: v for k, v in tensors.items() if k not in modules})
    assign_modules(host, name, modules)
    host._update_requires_grad([name])


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({error}); it may be cut off. Save or download the adapter again."
        ) from error


def read_pickle(source: str | os.PathLike, options: LoadOptions) -> dict[str, Tensor]:
    """An old `adapter_model.bin`, only when asked for and never with code in it."""
    path = find_file(source, PICKLE_NAME, required=False, **options.hub)
    if path is None:
        find_file(source, WEIGHTS_NAME, **options.hub)  # raises, saying what is there
    if not options.allow_pickle:
        raise CheckpointError(
            f"{source} has its weights in {PICKLE_NAME}, a pickle file. Pass allow_pickle=True to read it (tensors only), "
            "or convert it to safetensors."
        )
    return torch.load(path, map_location="cpu", weights_only=True)  # type: ignore[arg-type]


def assign(host: AdapterSet, name: str, tensors: dict[str, Tensor]) -> None:
    """Copy checked tensors into the adapter; if it is merged, its old values are taken out of the base's weights."""
    unmerge(host, name)
    host.methods[name].load(host, tensors)
    assign_modules(host, name, tensors)


def assign_modules(host: AdapterSet, name: str, tensors: dict[str, Tensor]) -> None:
    method = host.methods[name]
    for path, module in saved_modules(host.base, host.switch, name):
        start = f"{method.file_prefix}{method.saved_place(path)}."
        keys = module.state_dict()
        own = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
        own = {k: v for k, v in own.items() if k in keys}
        if own:
            module.load_state_dict(own)
