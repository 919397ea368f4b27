"""Adapter directories: HF PEFT's files, read and written, and what GraftLM keeps beside them.

    adapter_config.json          HF PEFT's configuration
    adapter_model.safetensors    HF PEFT's keys and shapes; our header: version, base fingerprint, own config fields
    training_state.safetensors   soft prompts with a network behind them, AdaLoRA: what further training needs
    model.safetensors            in a Trainer's checkpoint: a link to the file above that training resumes from, because a
                                 plain `transformers.Trainer` looks for this name
    README.md                    model card

Reading checks everything before anything is changed: each key and shape, and the base model's fingerprint.
"""

from __future__ import annotations

from ..card import write_card
from .fit import base_tensors, expected, normalise
from .read import check_same, config_for, fill, load_options
from .states import (
    get_peft_model_state_dict,
    load_peft_weights,
    load_state,
    nothing_missing,
    set_peft_model_state_dict,
)
from .write import TRAINING_NAME, save

__all__ = [
    "TRAINING_NAME",
    "base_tensors",
    "check_same",
    "config_for",
    "expected",
    "fill",
    "get_peft_model_state_dict",
    "load_options",
    "load_peft_weights",
    "load_state",
    "normalise",
    "nothing_missing",
    "save",
    "set_peft_model_state_dict",
    "write_card",
]
