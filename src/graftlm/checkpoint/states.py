"""An adapter's tensors as a state: given out, taken in, and what a Trainer's `load_state_dict` finds in its checkpoints."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys

from ..adapters import AdapterSet
from ..architectures import base_modules, clean_path
from ..errors import AdapterError, CheckpointError
from ..files import WEIGHTS_NAME, find_file
from ..injecting import Injected, adapters_of, remake
from ..merging import unmerge
from ..methods.biased import Biased
from .fit import checked, expected, normalise
from .read import assign, load_options, load_training, read_pickle, read_tensors
from .write import SCHEDULE, adapter_tensors, embedding_tensors


def nothing_missing() -> Any:
    """Torch's report of a load in which every key had its place."""
    return _IncompatibleKeys([], [])


def load_state(host: AdapterSet, state: dict[str, Tensor], plain: Callable, strict: bool, assign_: bool) -> Any:
    """`load_state_dict` of the wrapper.

    A state that covers the base goes torch's way. One that holds adapters only (what a Trainer reads from a checkpoint's
    `model.safetensors`) is checked like a file and read into the adapters; the base is left as it is.
    """
    parameters = {k: p for name in host.methods for k, p in host.adapter_parameters(name)}
    schedules = {k: v for k, v in state.items() if k.startswith(SCHEDULE)}
    state = {k: v for k, v in state.items() if k not in schedules} if schedules else state
    if any(k.startswith("base_model.") and k not in parameters for k in state) and set(parameters) <= set(state):
        unmerge(host)
        return plain(state, strict, assign_)
    if state and set(state) <= set(parameters):
        for name in host.methods:
            own = {k for k, _ in host.adapter_parameters(name)}
            missing = sorted(own - set(state))
            if missing and (own & set(state) or strict):
                raise CheckpointError(f"The state lacks tensors of adapter {name!r}: " + ", ".join(missing))
        unmerge(host)
        with torch.no_grad():
            for key, value in state.items():
                parameters[key].copy_(value)
        for name, method in host.methods.items():
            start = f"{SCHEDULE}{name}:"
            if found := {k.removeprefix(start): v for k, v in schedules.items() if k.startswith(start)}:
                method.load_training(host, found)
        return nothing_missing()
    name = host.active_adapter
    method = host.methods[name]
    training = method.training_tensors(host)
    if training and set(training) <= set(state):
        load_training(host, name, state)
        return nothing_missing()
    if set(state) >= set(host.state_dict()):
        unmerge(host)
        return plain(state, strict, assign_)
    assign(host, name, checked(host, name, dict(state), "This state"))
    return nothing_missing()


def get_peft_model_state_dict(
    model: Any,
    state_dict: dict[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, Tensor]:
    """An adapter's tensors under the keys of its file (HF PEFT's), adapter name removed; of a module that was changed in
    place under its own names, without the file's prefix.

    `state_dict`, where given, supplies the values under the model's own parameter names. A model that is sharded by
    `FullyShardedDataParallel` gives whole tensors, copied; all its processes must call this.
    """
    host = adapters_of(model)
    host._known(adapter_name)
    if hasattr(model, "_fsdp_wrapped_module") and state_dict is None:
        with type(model).summon_full_params(model, writeback=False):
            own = get_peft_model_state_dict(host, None, adapter_name, unwrap_compiled, save_embedding_layers)
            return {key: value.clone() for key, value in own.items()}
    tensors = embedding_tensors(host, adapter_name, save_embedding_layers) | adapter_tensors(host, adapter_name)
    own = dict(host.adapter_parameters(adapter_name))
    if isinstance(host, Injected):
        prefix = host.methods[adapter_name].file_prefix
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
        own = {k.removeprefix("base_model.model."): p for k, p in own.items()}
    if state_dict is None:
        return tensors
    values = {id(p): state_dict[k] for k, p in own.items() if k in state_dict}
    lookup = {p.data_ptr(): id(p) for p in own.values()}
    return {k: values.get(lookup.get(v.data_ptr(), -1), v) for k, v in tensors.items()}


def set_peft_model_state_dict(
    model: Any,
    peft_model_state_dict: dict[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Fill an attached adapter from such tensors; CheckpointError lists every key that does not fit.

    Trained biases in the state of an adapter whose configuration says `bias="none"` become the adapter's, with a warning.
    """
    host = adapters_of(model)
    host._known(adapter_name)
    if ignore_mismatched_sizes:
        raise AdapterError("ignore_mismatched_sizes would leave tensors untrained; give a state that fits.")
    state = dict(peft_model_state_dict)
    with with_biases(host, adapter_name, state):
        tensors = checked(host, adapter_name, state, "This state")
    remake(host, adapter_name, on_meta=False)
    assign(host, adapter_name, tensors)
    return nothing_missing()


@contextmanager
def with_biases(host: AdapterSet, name: str, state: dict[str, Tensor]) -> Iterator[None]:
    """Around the check of a state: where it holds trained biases and the adapter's configuration says that it has none, the
    adapter gets them. A state has no configuration of its own, so it is the state that tells."""
    method: Any = host.methods[name]
    takes = isinstance(method, Biased) and not isinstance(host, Injected) and method.config.bias == "none"  # type: ignore[attr-defined]
    wanted = expected(host, name) if takes and any(k.endswith(".bias") for k in state) else {}
    more = [k for k in state if wanted and normalise(k, name, wanted, method.file_prefix) not in wanted]
    layers = [path for path, _ in method.layers(host)] if more else []
    biases = {
        f"{method.file_prefix}{path}{'.base_layer' if path in layers else ''}.bias": path
        for path, module in ((clean_path(p), m) for p, m in base_modules(host.base) if more)
        if module._parameters.get("bias") is not None
    }
    found = {biases.get(normalise(k, name, dict.fromkeys(biases), method.file_prefix)) for k in more} - {None}  # type: ignore[arg-type]
    if not found:
        yield
        return
    word = method.own_biases if found <= set(layers) else "all"
    with method.taking_biases(host, word):
        yield
    warnings.warn(
        f"The state has trained biases, and adapter {name!r} was made with bias='none': they are the adapter's now, whose "
        f"configuration says bias={word!r} from here on.",
        stacklevel=4,
    )


def load_peft_weights(model_id: str | os.PathLike, device: str | None = None, **kwargs: Any) -> dict[str, Tensor]:
    """The tensors of an adapter directory."""
    options = load_options(kwargs)
    path = find_file(model_id, WEIGHTS_NAME, required=False, **options.hub)
    tensors = read_tensors(path) if path else read_pickle(model_id, options)
    return {k: v.to(device or "cpu") for k, v in tensors.items()}
