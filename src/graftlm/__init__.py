"""GraftLM: many small adapters on one frozen language model."""

from .checkpoint import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from .methods import (
    BottleneckConfig,
    BottleneckPlacement,
    LoraConfig,
    PeftConfig,
    PeftType,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    PromptLearningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
)
from .model import PeftModel, get_peft_model
from .quantization import prepare_model_for_kbit_training

__version__ = "0.1.0"

__all__ = [
    "BottleneckConfig",
    "BottleneckPlacement",
    "LoraConfig",
    "PeftConfig",
    "PeftModel",
    "PeftType",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "PromptTuningInit",
    "TaskType",
    "get_peft_model",
    "get_peft_model_state_dict",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "set_peft_model_state_dict",
]
