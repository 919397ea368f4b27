"""Adapter directories: HF PEFT's files, read and written, and what GraftLM keeps beside them.

    adapter_config.json          HF PEFT's configuration
    adapter_model.safetensors    HF PEFT's keys and shapes; our header: version, base fingerprint, own config fields
    training_state.safetensors   soft prompts with a network behind them: what further training needs
    model.safetensors            in a Trainer's checkpoint: a link to the file above that training resumes from, because a
                                 plain `transformers.Trainer` looks for this name
    README.md                    model card

Reading checks everything before anything is changed: each key and shape, and the base model's fingerprint.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys

from . import fingerprint
from .architectures import token_embeddings
from .card import write_card
from .errors import AdapterError, CheckpointError
from .files import HEADER_KEY, PICKLE_NAME, WEIGHTS_NAME, find_file, header_of, hub_options
from .layers import as_it_was, frozen_of, saved_modules
from .methods import PeftConfig
from .methods.base import clean_path
from .methods.fields import refuse_switched_on

if TYPE_CHECKING:
    from .model import PeftModel

__all__ = ["config_for", "fill", "load_options", "load_state", "nothing_missing", "save", "write_card"]

TRAINING_NAME = "training_state.safetensors"
TRAINER_NAME = "model.safetensors"
FORMAT = 1


# Other arguments of transformers' and HF PEFT's saving; `...`: without meaning here. (`push_to_hub` is a method.)
NOT_SAVED = {
    "path_initial_model_for_weight_conversion": None, "push_to_hub": False, "variant": None, "max_shard_size": ...,
    "token": ..., "save_function": ..., "save_peft_format": True, "save_original_format": ...,
    "distributed_checkpoint": False,
}  # fmt: skip


# -- writing -----------------------------------------------------------------------------------------------------------
def save(
    host: PeftModel,
    save_directory: str | os.PathLike,
    safe_serialization: bool = True,
    selected_adapters: list[str] | str | None = None,
    save_embedding_layers: str | bool = "auto",
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = ...,  # type: ignore[assignment]
    **others: Any,
) -> None:
    """Write adapters into a directory: "default" into it, others into folders of their names (HF PEFT's layout).

    Args:
        selected_adapters: only these.
        safe_serialization: must be True; weights are safetensors.
        is_main_process: False writes nothing.
        state_dict: given (even as None) by a `transformers.Trainer`; the directory is then one of its checkpoints, and a
            `model.safetensors` is added that it resumes from.
        save_embedding_layers: save the base's input and output embeddings along: True, False, or "auto": where the
            vocabulary has another size than in the configuration file that the base was loaded from (new tokens' rows
            would be lost otherwise).
        others: what transformers and HF PEFT take besides (shards, formats), as far as it changes nothing.

    Raises:
        AdapterError: an unknown adapter name.
        UnsupportedError: an option of HF PEFT's that is not here.
        CheckpointError: `save_directory` is a file, or pickle is asked for.
    """
    if unknown := sorted(others.keys() - NOT_SAVED.keys()):
        raise TypeError(f"save_pretrained: unexpected keyword arguments {unknown}")
    refuse_switched_on("save_pretrained", others, NOT_SAVED)
    if not is_main_process:
        return
    if not safe_serialization:
        raise CheckpointError("safe_serialization=False would write a pickle file; weights are written as safetensors only.")
    folder = Path(save_directory)
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; save_pretrained needs a directory.")
    chosen = [selected_adapters] if isinstance(selected_adapters, str) else selected_adapters
    names = list(host.methods) if chosen is None else list(chosen)
    host._known(*names)
    for name in names:
        target = folder if name == "default" else folder / name
        write_adapter(host, name, target, embedding_tensors(host, name, save_embedding_layers))
    if state_dict is not ...:
        write_trainer_file(host, folder)


def write_adapter(host: PeftModel, name: str, folder: Path, embeddings: dict[str, Tensor]) -> None:
    """One adapter into one directory; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    method = host.methods[name]
    config = method.config
    own = {k: v for k, v in config.to_dict().items() if k in config.own_fields}
    header = {"format": FORMAT, "config": own, "base": fingerprint.of(host.base)}
    write_tensors(folder / WEIGHTS_NAME, embeddings | adapter_tensors(host, name), header)
    training = method.training_tensors(host)
    if training:
        training |= {k: v for k, v in adapter_tensors(host, name).items() if k not in method.tensors(host)}
        write_tensors(folder / TRAINING_NAME, training, {"format": FORMAT})
    else:
        (folder / TRAINING_NAME).unlink(missing_ok=True)
    config.save_pretrained(folder, inference_mode=True)
    write_card(host, name, folder)


def adapter_tensors(host: PeftModel, name: str) -> dict[str, Tensor]:
    """The tensors of an adapter's weights file under HF PEFT's keys, modules to save included."""
    method = host.methods[name]
    tensors = dict(method.tensors(host))
    for path, module in saved_modules(host.base, host.switch, name):
        for key, value in module.state_dict().items():
            tensors[f"{method.file_prefix}{path}.{key}"] = value
    return tensors


def embedding_tensors(host: PeftModel, name: str, choice: str | bool) -> dict[str, Tensor]:
    """The base's embeddings under HF PEFT's keys, where `save_embedding_layers` asks for them."""
    if choice not in (True, False, "auto"):
        raise AdapterError(f"save_embedding_layers={choice!r}: expected True, False or 'auto'.")
    if choice is False or (choice == "auto" and not vocabulary_resized(host.base)):
        return {}
    tensors = {}
    inputs, outputs = token_embeddings(host.base) and host.base.get_input_embeddings(), host.base.get_output_embeddings()
    wanted = {id(m) for m in (inputs, outputs) if m is not None}
    for path, module in host.base.named_modules(remove_duplicate=False):
        if id(module) in wanted and not hasattr(module, "original_module"):
            inner = ".base_layer" if hasattr(module, "base_layer") else ""
            tensors[f"{host.methods[name].file_prefix}{clean_path(path)}{inner}.weight"] = fingerprint.plain(module).weight
    return tensors


def vocabulary_resized(base: Any) -> bool:
    """Whether the vocabulary has another size than in the local configuration file that the base came from."""
    path = Path(getattr(base, "name_or_path", "") or "", "config.json")
    if not getattr(base, "name_or_path", None) or not path.is_file():
        return False
    stored = json.loads(path.read_text(encoding="utf-8")).get("vocab_size")
    return stored is not None and stored != getattr(base.config, "vocab_size", stored)


def write_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """A safetensors file with our header, put in place in one step."""
    ready = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
    temporary = path.with_suffix(".tmp")
    save_file(ready, temporary, metadata={HEADER_KEY: json.dumps(header)})
    os.replace(temporary, path)


def write_trainer_file(host: PeftModel, folder: Path) -> None:
    """`model.safetensors` of a Trainer's checkpoint: the file that training resumes from, linked if there is one adapter."""
    target = folder / TRAINER_NAME
    target.unlink(missing_ok=True)
    if len(host.methods) > 1:
        named: dict[str, Tensor] = {k: p for name in host.methods for k, p in host.adapter_parameters(name)}
        write_tensors(target, named, {"format": FORMAT})
        return
    name = next(iter(host.methods))
    source = folder if name == "default" else folder / name
    source = source / (TRAINING_NAME if (source / TRAINING_NAME).exists() else WEIGHTS_NAME)
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


# -- reading -----------------------------------------------------------------------------------------------------------
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


def check_dtype(host: PeftModel, dtype: Any) -> None:
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


def fill(host: PeftModel, source: str | os.PathLike, name: str, options: LoadOptions) -> None:
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


def load_training(host: PeftModel, name: str, tensors: dict[str, Tensor]) -> None:
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


def expected(host: PeftModel, name: str) -> dict[str, torch.Size]:
    """Keys and shapes of the file that adapter `name` needs."""
    method = host.methods[name]
    shapes = dict(method.expected_shapes(host))
    for path, module in saved_modules(host.base, host.switch, name):
        shapes |= {f"{method.file_prefix}{path}.{k}": v.shape for k, v in module.state_dict().items()}
    return shapes


def normalise(key: str, name: str, wanted: dict[str, torch.Size], prefix: str) -> str:
    """A file's key as this version writes it: other versions differ in the prefix, the adapter's name, and DoRA's suffix."""
    for candidate in (key, key.removesuffix(".weight"), key.replace(f".{name}.", "."), key.replace(".default.", ".")):
        bare = re.sub(r"^base_model\.(model\.)?", "", candidate)
        for full in (candidate, prefix + bare, f"{prefix}model.{bare}", "base_model." + bare):
            if full in wanted:
                return full
    return key


def checked(host: PeftModel, name: str, tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The file's tensors under our keys.

    Raises:
        CheckpointError: lists every missing key, every unexpected key, and both shapes where they differ.
    """
    wanted = expected(host, name)
    prefix = host.methods[name].file_prefix
    found = {normalise(k, name, wanted, prefix): v for k, v in tensors.items()}
    extra = base_tensors(host, {k: v for k, v in found.items() if k not in wanted})
    extra |= doubled(found, wanted)
    missing = sorted(set(wanted) - set(found))
    unexpected = sorted(set(found) - set(wanted) - set(extra))
    shapes = [
        f"{k}: the file has {tuple(found[k].shape)}, this model needs {tuple(wanted[k])}"
        for k in sorted(wanted) if k in found and found[k].shape != wanted[k]
    ]  # fmt: skip
    broken = [k for k in wanted if k in found and found[k].is_floating_point() and not torch.isfinite(found[k]).all()]
    problems = [("missing keys", missing), ("unexpected keys", unexpected), ("shapes that differ", shapes),
                ("keys with NaN or infinite values", broken)]  # fmt: skip
    if any(items for _, items in problems):
        lines = "".join(f"\n  {title} ({len(items)}):\n    " + "\n    ".join(items) for title, items in problems if items)
        raise CheckpointError(
            f"{where} does not fit this model as adapter {name!r}; nothing was loaded.{lines}\n"
            "Is this the base model (and version) that the adapter was trained on?"
        )
    return found


def base_tensors(host: PeftModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the unexpected tensors those that are copies of the base's embeddings, which HF PEFT may save along.

    Raises:
        CheckpointError: such a copy differs from the base's (its vocabulary was resized or trained).
    """
    copies = {}
    for key, value in tensors.items():
        path = re.sub(r"^base_model\.(model\.)?", "", key).replace(".base_layer", "")
        module_path, _, part = path.rpartition(".")
        try:
            module = host.base.get_submodule(module_path)
        except AttributeError:
            continue
        module = as_it_was(getattr(getattr(module, "frozen", None), "layer", module))
        own = getattr(module, part, None)
        if module_path.rpartition(".")[2] not in EMBEDDINGS or not isinstance(own, Tensor) or own.dim() != 2:
            continue
        if isinstance(own, Tensor) and own.shape == value.shape and share_of_equal_rows(own, value) > 0.5:
            copies[key] = value
            continue
        if own.shape != value.shape or not torch.allclose(own.float(), value.to(own.device).float(), rtol=0.02, atol=1e-4):
            raise CheckpointError(
                f"{key} {tuple(value.shape)} is an embedding of another base model: this model's "
                f"{tuple(own.shape)} differs. "
                "Resize and load the base as it was when the adapter was trained (its embeddings included)."
            )
        copies[key] = value
    return copies


def share_of_equal_rows(a: Tensor, b: Tensor) -> float:
    """Share of rows of two tables [rows, width] that are equal up to rounding."""
    return rows_that_differ(a, b).logical_not().float().mean().item()


def rows_that_differ(a: Tensor, b: Tensor) -> Tensor:
    x, y = a.detach().float().flatten(1), b.to(a.device).float().flatten(1)
    return ((x - y).abs() > 0.02 * torch.maximum(x.abs(), y.abs()) + 1e-4).any(dim=1)


def restore_embeddings(host: PeftModel, tensors: dict[str, Tensor], where: str) -> None:
    """Rows of the base's embeddings that the file brings along and that differ here (new tokens) are taken from it."""
    for key, value in tensors.items():
        path = re.sub(r"^base_model\.(model\.)?", "", key).replace(".base_layer", "")
        module_path, _, part = path.rpartition(".")
        if module_path.rpartition(".")[2] not in EMBEDDINGS or part != "weight":
            continue
        module = host.base.get_submodule(module_path)
        if hasattr(module, "original_module"):  # the adapter's own copy was filled already
            continue
        layer = fingerprint.plain(module)
        weight = as_it_was(layer).weight
        rows = rows_that_differ(weight, value)
        if rows.any():
            with torch.no_grad():
                weight[rows] = value.to(weight.device, weight.dtype)[rows]
            if (frozen := frozen_of(layer)) is not None:
                frozen.stale()  # the merged weight has the old rows
            print(f"{where}: {int(rows.sum())} rows of {module_path} (new tokens) were taken from the adapter's file.")


def doubled(found: dict[str, Tensor], wanted: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Tensors that HF PEFT writes twice with bias="all": a trained head's biases, also under the wrapper's names."""
    twice = {}
    for key, value in found.items():
        plain = re.sub(r"\.(modules_to_save(\.default)?|original_module)(?=\.)", "", key)
        if key in wanted or plain not in wanted or plain not in found:
            continue
        if ".original_module." in key or torch.equal(found[plain], value):
            twice[key] = value
    return twice


EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_in", "embed_out")


def assign(host: PeftModel, name: str, tensors: dict[str, Tensor]) -> None:
    """Copy checked tensors into the adapter; if it is merged, its old values are taken out of the base's weights."""
    host._unmerge(name)
    host.methods[name].load(host, tensors)
    assign_modules(host, name, tensors)


def assign_modules(host: PeftModel, name: str, tensors: dict[str, Tensor]) -> None:
    prefix = host.methods[name].file_prefix
    for path, module in saved_modules(host.base, host.switch, name):
        start = f"{prefix}{path}."
        keys = module.state_dict()
        own = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
        own = {k: v for k, v in own.items() if k in keys}
        if own:
            module.load_state_dict(own)


# -- states --------------------------------------------------------------------------------------------------------------
def nothing_missing() -> Any:
    """Torch's report of a load in which every key had its place."""
    return _IncompatibleKeys([], [])


def load_state(host: PeftModel, state: dict[str, Tensor], plain: Callable, strict: bool, assign_: bool) -> Any:
    """`load_state_dict` of the wrapper.

    A state that covers the base goes torch's way. One that holds adapters only (what a Trainer reads from a checkpoint's
    `model.safetensors`) is checked like a file and read into the adapters; the base is left as it is.
    """
    parameters = {k: p for name in host.methods for k, p in host.adapter_parameters(name)}
    if any(k.startswith("base_model.") and k not in parameters for k in state) and set(parameters) <= set(state):
        host.unmerge_adapter()
        return plain(state, strict, assign_)
    if state and set(state) <= set(parameters):
        for name in host.methods:
            own = {k for k, _ in host.adapter_parameters(name)}
            missing = sorted(own - set(state))
            if missing and (own & set(state) or strict):
                raise CheckpointError(f"The state lacks tensors of adapter {name!r}: " + ", ".join(missing))
        host.unmerge_adapter()
        with torch.no_grad():
            for key, value in state.items():
                parameters[key].copy_(value)
        return nothing_missing()
    name = host.active_adapter
    method = host.methods[name]
    training = method.training_tensors(host)
    if training and set(training) <= set(state):
        load_training(host, name, state)
        return nothing_missing()
    if set(state) >= set(host.state_dict()):
        host.unmerge_adapter()
        return plain(state, strict, assign_)
    assign(host, name, checked(host, name, dict(state), "This state"))
    return nothing_missing()


def get_peft_model_state_dict(
    model: PeftModel,
    state_dict: dict[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, Tensor]:
    """An adapter's tensors under the keys of its file (HF PEFT's), adapter name removed.

    `state_dict`, where given, supplies the values under the model's own parameter names.
    """
    if unwrap_compiled and hasattr(model, "_orig_mod"):
        model = model._orig_mod
    model._known(adapter_name)
    tensors = embedding_tensors(model, adapter_name, save_embedding_layers) | adapter_tensors(model, adapter_name)
    if state_dict is None:
        return tensors
    own = dict(model.adapter_parameters(adapter_name))
    values = {id(p): state_dict[k] for k, p in own.items() if k in state_dict}
    lookup = {p.data_ptr(): id(p) for p in own.values()}
    return {k: values.get(lookup.get(v.data_ptr(), -1), v) for k, v in tensors.items()}


def set_peft_model_state_dict(
    model: PeftModel,
    peft_model_state_dict: dict[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Fill an attached adapter from such tensors; CheckpointError lists every key that does not fit."""
    model._known(adapter_name)
    if ignore_mismatched_sizes:
        raise AdapterError("ignore_mismatched_sizes would leave tensors untrained; give a state that fits.")
    assign(model, adapter_name, checked(model, adapter_name, dict(peft_model_state_dict), "This state"))
    return nothing_missing()


def load_peft_weights(model_id: str | os.PathLike, device: str | None = None, **kwargs: Any) -> dict[str, Tensor]:
    """The tensors of an adapter directory."""
    options = load_options(kwargs)
    path = find_file(model_id, WEIGHTS_NAME, required=False, **options.hub)
    tensors = read_tensors(path) if path else read_pickle(model_id, options)
    return {k: v.to(device or "cpu") for k, v in tensors.items()}
