"""Names that HF PEFT keeps under `peft.utils`."""

from .architectures import LORA_TARGETS as TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from .checkpoint import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from .files import WEIGHTS_NAME as SAFETENSORS_WEIGHTS_NAME
from .methods import PeftType, TaskType
from .methods.base import CONFIG_NAME
from .preparation import prepare_model_for_kbit_training

__all__ = [
    "CONFIG_NAME",
    "SAFETENSORS_WEIGHTS_NAME",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "PeftType",
    "TaskType",
    "get_peft_model_state_dict",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "set_peft_model_state_dict",
]
