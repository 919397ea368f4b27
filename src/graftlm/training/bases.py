"""Loading the base model that a recipe names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from .. import bundled
from ..errors import GraftError, nearest


class BaseModelError(GraftError, ValueError):
    """A base model that cannot be loaded."""


def resolve_base(
    name: str, *, task: str = "auto", dtype: str = "auto", device: str | torch.device | None = None, **options: Any
) -> tuple[Any, Any]:
    """The base model and its tokenizer.

    Args:
        name: "graftlm-base" (bundled), a local directory, or a hub id.
        task: "causal-lm", "seq2seq", "classification", or "auto" by the model's configuration.
        dtype: "fp32", "bf16", or "auto": bf16 where a GPU has it, else fp32.
        device: where to put it; the GPU where there is one.
        options: for `from_pretrained` (`num_labels`, `revision`, …); remote code cannot be switched on.

    Raises:
        BaseModelError: nothing there, no network, or a kind of model that cannot be trained here.
    """
    from transformers import AutoConfig, AutoTokenizer

    if options.pop("trust_remote_code", False):
        raise BaseModelError("trust_remote_code is never switched on: only models whose code is in transformers are loaded.")
    path = checked_path(name)
    hub = {k: options[k] for k in ("revision",) if k in options}
    config = loading(name, lambda: AutoConfig.from_pretrained(path, **hub))
    loader = auto_class(config, task, name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = loading(name, lambda: loader.from_pretrained(path, dtype=torch_dtype(dtype), **options))
    tokenizer = loading(name, lambda: AutoTokenizer.from_pretrained(path, **hub))
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer


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
    if "/" not in path and (hint := nearest(path, [bundled.BASE_NAME])):
        raise BaseModelError(f"unknown base model {name!r}{hint}")
    return path


def loading(name: str, action: Any) -> Any:
    """Run a step of loading; what goes wrong becomes a BaseModelError that says whether the network is the reason."""
    try:
        return action()
    except (OSError, ValueError, ImportError) as error:
        local = os.path.isdir(bundled.resolve(name))
        advice = (
            "Its files are incomplete or of a kind that this version of transformers does not know."
            if local
            else "It is no local directory, and the hub could not give it: there is no network, no such id, or no access "
            f"to it. Pass a local directory, or {bundled.BASE_NAME!r} (bundled, works offline)."
        )
        text = str(error).strip().splitlines() or [""]
        raise BaseModelError(f"cannot load the base model {name!r}. {advice} ({type(error).__name__}: {text[0]})") from error


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


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of "fp32", "bf16" or "auto"."""
    if name == "auto":
        name = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"
    if name not in ("fp32", "bf16"):
        raise BaseModelError(f"dtype={name!r}: expected 'fp32', 'bf16' or 'auto'{nearest(name, ['fp32', 'bf16', 'auto'])}")
    return torch.bfloat16 if name == "bf16" else torch.float32
