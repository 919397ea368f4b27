"""The registry of methods: importing a file here makes its method known. A new method is its file and a line below."""

from .adalora import AdaLoraConfig
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
from .boft import BOFTConfig
from .bottleneck import BottleneckConfig, BottleneckPlacement
from .ia3 import IA3Config
from .loha import LoHaConfig
from .lora import LoftQConfig, LoraConfig
from .miss import MissConfig
from .oft import OFTConfig
from .p_tuning import PromptEncoderConfig, PromptEncoderReparameterizationType
from .prefix_tuning import PrefixTuningConfig
from .prompt_tuning import PromptTuningConfig, PromptTuningInit

__all__ = [
    "METHODS",
    "AdaLoraConfig",
    "BOFTConfig",
    "BottleneckConfig",
    "BottleneckPlacement",
    "IA3Config",
    "LoHaConfig",
    "LoftQConfig",
    "LoraConfig",
    "Method",
    "MissConfig",
    "OFTConfig",
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
    "get_peft_config",
    "method_for",
]
