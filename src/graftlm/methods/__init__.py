"""The registry of methods: importing a file here makes its method known. A new method is its file and a line below."""

from .base import (
    METHODS,
    Method,
    PeftConfig,
    PeftType,
    PromptLearningConfig,
    TaskType,
    config_class,
    get_peft_config,
    method_for,
)
from .bottleneck import BottleneckConfig, BottleneckPlacement
from .ia3 import IA3Config
from .loha import LoHaConfig
from .lora import LoftQConfig, LoraConfig
from .lora_data_config import CordaConfig, EvaConfig, LoraGAConfig
from .lora_data_init import preprocess_corda, preprocess_loraga
from .lora_eva import get_eva_state_dict, initialize_lora_eva_weights
from .p_tuning import PromptEncoderConfig, PromptEncoderReparameterizationType
from .prefix_tuning import PrefixTuningConfig
from .prompt_tuning import PromptTuningConfig, PromptTuningInit

__all__ = [
    "METHODS",
    "BottleneckConfig",
    "BottleneckPlacement",
    "CordaConfig",
    "EvaConfig",
    "IA3Config",
    "LoHaConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "Method",
    "PeftConfig",
    "PeftType",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "PromptTuningInit",
    "TaskType",
    "config_class",
    "get_eva_state_dict",
    "get_peft_config",
    "initialize_lora_eva_weights",
    "method_for",
    "preprocess_corda",
    "preprocess_loraga",
]
