"""Names that HF PEFT keeps under `peft.utils`."""

from __future__ import annotations

import re
from typing import Any

from .architectures import LORA_TARGETS as TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from .checkpoint import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from .compat.helpers import (
    ALLOWED_COMPUTE_DTYPES,
    UPCAST_DTYPES,
    cast_mixed_precision_params,
    get_base_model_state_dict,
    id_tensor_storage,
    infer_device,
    set_base_model_state_dict,
    shift_tokens_right,
    transpose,
)
from .compat.helpers import IA3_FEEDFORWARD as TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
from .compat.helpers import batch_size as _get_batch_size
from .compat.helpers import get_submodules as _get_submodules
from .compat.mappings import register_peft_method
from .compat.tuners import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from .errors import GraftError as PeftError
from .errors import TargetError as NoMatchingPeftModuleError
from .files import WEIGHTS_NAME as SAFETENSORS_WEIGHTS_NAME
from .layers import ModulesToSaveWrapper
from .methods import METHODS, PeftType, TaskType
from .methods.base import CONFIG_NAME
from .methods.ln_tuning import TARGETS as TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING
from .preparation import prepare_model_for_kbit_training

INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"
PeftWarning = UserWarning  # of which kind warnings are here

__all__ = [
    "ALLOWED_COMPUTE_DTYPES",
    "CONFIG_NAME",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "SAFETENSORS_WEIGHTS_NAME",
    "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING",
    "TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "UPCAST_DTYPES",
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "NoMatchingPeftModuleError",
    "PeftError",
    "PeftType",
    "PeftWarning",
    "TaskType",
    "TrainableTokensWrapper",
    "_get_batch_size",
    "_get_submodules",
    "cast_mixed_precision_params",
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "id_tensor_storage",
    "infer_device",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "register_peft_method",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "shift_tokens_right",
    "transpose",
]


def __getattr__(name: str) -> Any:
    """`TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING` and its like: the default layers of a method, by family."""
    if found := re.fullmatch(r"TRANSFORMERS_MODELS_TO_(\w+)_TARGET_MODULES_MAPPING", name):
        for peft_type, (_, method) in METHODS.items():
            families = getattr(method, "families", None)
            if str(getattr(peft_type, "value", peft_type)).replace("_", "") == found[1] and families is not None:
                return families
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
