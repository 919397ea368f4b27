"""Loading the base model that a recipe names, quantised where it says so."""

from __future__ import annotations

import copy
import os
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants as hub

from .. import bundled
from ..errors import BaseModelError, nearest
from ..kernels.linear import working_dtype
from ..quantization import (
    SCHEMES,
    bitsandbytes,
    compute_in,
    config_scheme,
    is_quantized,
    loading_options,
    settle,
    unpacked_parameters,
)

LARGE = 100_000_000  # parameters from which on bf16 is the default on CPUs that have it
# transformers puts other functions in the place of torch's while it makes a model: two threads at a time leave them there
# for good, and later models of the process have no values, or heads that are not tied.
ONE_BY_ONE = threading.RLock()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_base(
    name: str,
    *,
    task: str = "auto",
    dtype: str = "auto",
    device: str | torch.device | None = None,
    quantization: str | None = None,
    in_memory: bool = False,
    **options: Any,
) -> tuple[Any, Any]:
    """The base model and its tokenizer.

    Args:
        name: "graftlm-base" (bundled), "smollm2" (from its package), a local directory or GGUF file, or a hub id.
        task: "causal-lm", "seq2seq", "classification", or "auto" by the model's configuration.
        dtype: "fp32", "bf16", "fp16" (GPUs only), or "auto": bf16 on a GPU that has it, and for models of more than 100
            million parameters on a CPU that has it (adapters stay in fp32); else fp32.
        device: where to put it; the GPU where there is one.
        quantization: "int8", "nf4" or "fp4", of a checkpoint that is not quantised; one that is loads as it was saved.
            4-bit layers compute in `dtype`; under "auto" in bf16, or on a CPU that multiplies bf16 slowly in fp32.
        in_memory: leave an unquantised base in main memory, in the device's dtype; `sharding.shard` takes its parts there.
        options: for `from_pretrained` (`num_labels`, `revision`, …); remote code cannot be switched on.

    Raises:
        BaseModelError: nothing there, no network, or a kind of model, quantisation, device or dtype that is not to be had.
        UnsupportedError: bitsandbytes is needed and missing.
    """
    from transformers import AutoConfig, AutoTokenizer

    if options.pop("trust_remote_code", False):
        raise BaseModelError("trust_remote_code is never switched on: only models whose code is in transformers are loaded.")
    place = checked_device(device)
    if dtype != "auto":
        torch_dtype(dtype, place)
    path = checked_path(name)
    hub = {k: options[k] for k in ("revision",) if k in options}
    config = loading(name, path, lambda: AutoConfig.from_pretrained(path, **hub))
    loader = auto_class(config, task, name)
    kind = auto_dtype(config, loader, place) if dtype == "auto" else torch_dtype(dtype, place)
    slow = dtype == "auto" and place.type == "cpu" and not cpu_has_bf16()
    compute_dtype = torch.bfloat16 if dtype == "auto" and not slow else kind
    options = {"dtype": kind} | quantized_options(name, config, scheme_name(quantization), compute_dtype, place) | options
    model = loading(name, path, lambda: loader.from_pretrained(path, **options))
    if options["dtype"] == "auto" and (dtype != "auto" or slow):
        cast_unpacked(model, kind)
    if is_quantized(model) and place.type == "cpu":
        let_go_of_file(model)
    if slow:
        compute_in(model, kind)
    tokenizer = loading(name, path, lambda: AutoTokenizer.from_pretrained(path, **hub))
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return (model if in_memory else on_device(model, place)).eval(), tokenizer


def checked_path(name: str) -> str:
    """The name as `from_pretrained` takes it; BaseModelError for what is clearly no model."""
    path = bundled.resolve(name)
    if os.path.isdir(path):
        if not (Path(path) / "config.json").is_file():
            hint = (
                " It is an adapter: name its base here and the adapter with init_from or --adapter."
                if (Path(path) / "adapter_config.json").is_file()
                else ""
            )
            raise BaseModelError(f"{name!r} holds no config.json, so it is no base model.{hint}")
        return path
    if os.path.exists(path) or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise BaseModelError(f"there is no base model directory {name!r} (working directory {os.getcwd()!r})")
    if "/" not in path and (hint := nearest(path, bundled.NAMES)):
        raise BaseModelError(f"unknown base model {name!r}{hint}")
    return path


def loading(name: str, path: str, action: Any) -> Any:
    """Run a step of loading; what goes wrong becomes a BaseModelError that says whether the network is the reason."""
    try:
        with ONE_BY_ONE, nullcontext() if os.path.isdir(path) or hub_is_known() else offline():
            return action()
    except (OSError, ValueError, ImportError) as error:
        local = os.path.isdir(path)
        advice = (
            "Its files are incomplete or of a kind that this version of transformers does not know."
            if local
            else "It is no local directory, and the hub could not give it: there is no network, no such id, or no access "
            f"to it. Pass a local directory, or {bundled.BASE_NAME!r} (bundled, works offline)."
        )
        text = str(error).strip().splitlines() or [""]
        raise BaseModelError(f"cannot load the base model {name!r}. {advice} ({type(error).__name__}: {text[0]})") from error


def hub_is_known() -> bool:
    """Whether the hub's name can be resolved, or need not be: behind a proxy."""
    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(hub.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


@contextmanager
def offline() -> Iterator[None]:
    """Within the block the hub is not asked: its files come from the cache, or not at all. (It would be asked again and
    again, for 20 seconds.)"""
    before, hub.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


def auto_class(config: Any, task: str, name: str) -> Any:
    """transformers' auto class for the task."""
    import transformers as t

    if task == "classification":
        return t.AutoModelForSequenceClassification
    if task == "seq2seq" or (task == "auto" and getattr(config, "is_encoder_decoder", False)):
        return t.AutoModelForSeq2SeqLM
    if task not in ("auto", "causal-lm"):
        raise BaseModelError(f"task={task!r}: expected 'auto', 'causal-lm', 'seq2seq' or 'classification'")
    architectures = getattr(config, "architectures", None) or ()
    if task == "auto" and any(a.endswith("ForSequenceClassification") for a in architectures):
        return t.AutoModelForSequenceClassification
    if type(config) not in t.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise BaseModelError(f"{name!r} is a {config.model_type} model, which is no language model that writes text.")
    return t.AutoModelForCausalLM


def auto_dtype(config: Any, loader: Any, device: torch.device) -> torch.dtype:
    """bf16 where the device multiplies it and the model is large enough for that to count, else fp32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type != "cpu" or not cpu_has_bf16():
        return torch.float32
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    with torch.device("meta"):
        model = loader.from_config(plain)
    return torch.bfloat16 if sum(p.numel() for p in model.parameters()) > LARGE else torch.float32


def cpu_has_bf16() -> bool:
    """Whether the processor has instructions for products in bf16, and torch uses them."""
    has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(has and working_dtype(torch.bfloat16, torch.device("cpu")) is torch.bfloat16)


def torch_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of "fp32", "bf16" or "fp16" on a device."""
    if name not in DTYPES:
        names = [*DTYPES, "auto"]
        raise BaseModelError(f"dtype={name!r}: expected one of {', '.join(names)}{nearest(name, names)}")
    if name == "fp16" and device.type == "cpu":
        raise BaseModelError(
            "dtype='fp16' needs a GPU: on a CPU there is no gradient scaling, and small gradients become zero. Use 'bf16', "
            "which takes the same memory, or 'fp32'."
        )
    return DTYPES[name]


def checked_device(device: str | torch.device | None) -> torch.device:
    """The device; without a name the GPU where there is one. BaseModelError for one that this machine has not."""
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise BaseModelError(f"device={device!r}: expected 'cpu', 'cuda' or one GPU, such as 'cuda:0'") from error
    have = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if place.type == "cuda" and (place.index or 0) >= have:
        found = f"{have} GPU(s)" if have else "no GPU"
        raise BaseModelError(
            f"device={str(device)!r}: torch finds {found} here. Leave it out for the best there is, or pass 'cpu'."
        )
    return place


def scheme_name(value: Any) -> Any:
    """A quantisation as the tables here spell it; None where it says that there is none."""
    plain = value.lower() if isinstance(value, str) else value
    return None if plain in ("none", "no", False) else plain


def quantized_options(
    name: str, config: Any, wanted: str | None, compute_dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """What `from_pretrained` needs to load a base quantised; nothing for an unquantised one.

    A checkpoint that was saved quantised is loaded in its own dtype: transformers leaves its weights in it in any case.

    Raises:
        BaseModelError: the checkpoint is quantised otherwise than wanted, or by a scheme that cannot be trained on.
    """
    stored = config_scheme(config)
    if stored is None:
        return loading_options(wanted, compute_dtype, device) if wanted else {}
    if stored not in (*SCHEMES, "torchao"):
        raise BaseModelError(
            f"{name!r} is quantised by {stored!r}, on which GraftLM cannot train. It trains on {', '.join(SCHEMES)} "
            "(bitsandbytes) and torchao's weight-only forms: take the unquantised checkpoint and quantise it while loading "
            "(quantization: nf4), or one that was saved in one of these."
        )
    if wanted not in (None, stored):
        raise BaseModelError(
            f"{name!r} is saved in {stored}, and quantization={wanted!r} was asked for. Leave quantization out, or take the "
            "unquantised checkpoint."
        )
    if stored in SCHEMES:
        bitsandbytes()
    return {"dtype": "auto", "device_map": {"": str(device)}}


def cast_unpacked(model: Any, dtype: torch.dtype) -> None:
    """Bring the weights of a quantised model that are not packed to a dtype."""
    for _, parameter in unpacked_parameters(model):
        parameter.data = parameter.data.to(dtype)


def let_go_of_file(model: Any) -> None:
    """Copy the few weights of a base quantised while loading that still lie in its mapped file: they would keep all of it in
    the process, with the wide weights that nobody reads again."""
    for _, parameter in unpacked_parameters(model):
        parameter.data = parameter.data.clone()


def on_device(model: Any, device: torch.device) -> Any:
    """A loaded model in its place; a quantised one is there already, and is made safe for training."""
    if not is_quantized(model):
        return model.to(device)
    settle(model)
    return model
