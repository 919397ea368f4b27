"""Adapter directories, written."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from .. import fingerprint
from ..adapters import AdapterSet
from ..architectures import innermost, token_embeddings
from ..card import write_card
from ..errors import AdapterError, CheckpointError
from ..files import HEADER_KEY, WEIGHTS_NAME
from ..layers import saved_modules
from ..methods.base import clean_path
from ..methods.fields import refuse_switched_on

TRAINING_NAME = "training_state.safetensors"
TRAINER_NAME = "model.safetensors"
SCHEDULE = "schedule:"  # how keys of an adapter's training state begin where a checkpoint has several adapters
FORMAT = 1


# Other arguments of transformers' and HF PEFT's saving; `...`: without meaning here. (`push_to_hub` is a method.)
NOT_SAVED = {
    "path_initial_model_for_weight_conversion": ..., "push_to_hub": False, "variant": None, "max_shard_size": ...,
    "token": ..., "save_function": ..., "save_peft_format": True, "save_original_format": ...,
    "distributed_checkpoint": False,
}  # fmt: skip


def save(
    host: AdapterSet,
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
            would be lost otherwise), unless the adapter itself holds the rows of all new tokens.
        others: what transformers and HF PEFT take besides (shards, formats), as far as it changes nothing. With
            `path_initial_model_for_weight_conversion` an adapter that started as PiSSA, OLoRA, LoftQ, CorDA or LoRA-GA is
            written as plain LoRA of twice the rank; the path is not read, since the start is here.

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
    plain = others.get("path_initial_model_for_weight_conversion") is not None
    for name in names:
        target = folder if name == "default" else folder / name
        with host.methods[name].as_plain(host) if plain else nullcontext():
            write_adapter(host, name, target, embedding_tensors(host, name, save_embedding_layers))
    if state_dict is not ...:
        write_trainer_file(host, folder)


def write_adapter(host: AdapterSet, name: str, folder: Path, embeddings: dict[str, Tensor]) -> None:
    """One adapter into one directory; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    method = host.methods[name]
    config = method.config
    fields = method.file_fields(host)
    own = {k: v for k, v in config.to_dict().items() if k in config.own_fields} if not fields else {}
    header = {"format": FORMAT, "config": own, "base": fingerprint.of(host.base)}
    write_tensors(folder / WEIGHTS_NAME, embeddings | adapter_tensors(host, name), header)
    training = method.training_tensors(host)
    if training:
        training |= {k: v for k, v in adapter_tensors(host, name).items() if k not in method.tensors(host)}
        write_tensors(folder / TRAINING_NAME, training, {"format": FORMAT})
    else:
        (folder / TRAINING_NAME).unlink(missing_ok=True)
    config.save_pretrained(folder, inference_mode=True, **fields)
    write_card(host, name, folder)


def adapter_tensors(host: AdapterSet, name: str) -> dict[str, Tensor]:
    """The tensors of an adapter's weights file under HF PEFT's keys, modules to save included."""
    method = host.methods[name]
    tensors = dict(method.tensors(host))
    for path, module in saved_modules(host.base, host.switch, name):
        for key, value in module.state_dict().items():
            tensors[f"{method.file_prefix}{method.saved_place(path)}.{key}"] = value
    return tensors


def embedding_tensors(host: AdapterSet, name: str, choice: str | bool) -> dict[str, Tensor]:
    """The base's embeddings under HF PEFT's keys, where `save_embedding_layers` asks for them."""
    if choice not in (True, False, "auto"):
        raise AdapterError(f"save_embedding_layers={choice!r}: expected True, False or 'auto'.")
    if choice is False or (choice == "auto" and not vocabulary_resized(host.base)):
        return {}
    rows = new_rows(host.base) if choice == "auto" else None
    tensors: dict[str, Tensor] = {}
    outputs = getattr(host.base, "get_output_embeddings", lambda: None)()
    inputs = None if token_embeddings(host.base) is None else host.base.get_input_embeddings()
    if inputs is None and outputs is None:
        warnings.warn(
            f"save_embedding_layers=True: Could not identify embedding layer(s) of {type(host.base).__name__}, which has no "
            "get_input_embeddings(); nothing of the base was saved.",
            stacklevel=3,
        )
    wanted = {id(m) for m in (inputs, outputs) if m is not None}
    for path, module in host.base.named_modules(remove_duplicate=False):
        if id(module) in wanted and not hasattr(module, "original_module") and not holds_rows(module, name, rows):
            inner = ".base_layer" if hasattr(module, "base_layer") else ""
            tensors[f"{host.methods[name].file_prefix}{clean_path(path)}{inner}.weight"] = innermost(module).weight
    return tensors


def holds_rows(module: Any, name: str, new: range | None) -> bool:
    """Whether an adapter trains rows of a module, all of these new ones among them: then the base's own need no saving.
    A warning where it leaves some out."""
    ids = getattr(getattr(module, "changes", {}).get(name), "ids", None)
    if ids is None or new is None:
        return False
    if missing := sorted(set(new) - set(ids)):
        warnings.warn(
            f"The vocabulary has new tokens whose rows adapter {name!r} does not train ({missing[0]}"
            f"{f' to {missing[-1]}' if len(missing) > 1 else ''}), so all of the embeddings are saved along. Train these "
            "tokens too for a small file, or pass save_embedding_layers=False where their rows do not matter.",
            stacklevel=5,
        )
    return not missing


def vocabulary_resized(base: Any) -> bool:
    """Whether the vocabulary has another size than in the local configuration file that the base came from."""
    stored = stored_vocabulary(base)
    return stored is not None and stored != getattr(base.config, "vocab_size", stored)


def new_rows(base: Any) -> range | None:
    """The tokens that the base's vocabulary has more than its configuration file; None where nothing says how many."""
    stored = stored_vocabulary(base)
    return None if stored is None else range(stored, getattr(base.config, "vocab_size", stored))


def stored_vocabulary(base: Any) -> int | None:
    """The vocabulary's size in the local configuration file that the base came from."""
    path = Path(getattr(base, "name_or_path", "") or "", "config.json")
    if not getattr(base, "name_or_path", None) or not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8")).get("vocab_size")


def write_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """A safetensors file with our header, put in place in one step."""
    ready = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
    temporary = path.with_suffix(".tmp")
    save_file(ready, temporary, metadata={HEADER_KEY: json.dumps(header)})
    os.replace(temporary, path)


def write_trainer_file(host: AdapterSet, folder: Path) -> None:
    """`model.safetensors` of a Trainer's checkpoint: the file that training resumes from, linked if there is one adapter."""
    target = folder / TRAINER_NAME
    target.unlink(missing_ok=True)
    if len(host.methods) > 1:
        named: dict[str, Tensor] = {k: p for name in host.methods for k, p in host.adapter_parameters(name)}
        for name, method in host.methods.items():
            if method.scheduled:
                named |= {f"{SCHEDULE}{name}:{k}": v for k, v in method.training_tensors(host).items()}
        write_tensors(target, named, {"format": FORMAT})
        return
    name = next(iter(host.methods))
    source = folder if name == "default" else folder / name
    source = source / (TRAINING_NAME if (source / TRAINING_NAME).exists() else WEIGHTS_NAME)
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
