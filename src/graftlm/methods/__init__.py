"""The registry of methods: importing a file here makes its method known. A new method is its file and a line below."""

from .adaption_prompt import AdaptionPromptConfig
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
from .cartridge import (
    CartridgeConfig,
    compose_cartridge_adapters,
    initialize_kv_prefix_from_past_key_values,
    initialize_kv_prefix_from_text,
)
from .ia3 import IA3Config
from .loha import LoHaConfig
from .lora import LoftQConfig, LoraConfig
from .multitask_prompt_tuning import MultitaskPromptTuningConfig, MultitaskPromptTuningInit
from .p_tuning import PromptEncoderConfig, PromptEncoderReparameterizationType
from .prefix_tuning import PrefixTuningConfig
from .prompt_tuning import PromptTuningConfig, PromptTuningInit
from .trainable_tokens import TrainableTokensConfig

__all__ = [
    "METHODS",
    "AdaptionPromptConfig",
    "BottleneckConfig",
    "BottleneckPlacement",
    "CartridgeConfig",
    "IA3Config",
    "LoHaConfig",
    "LoftQConfig",
    "LoraConfig",
    "Method",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "PeftConfig",
    "PeftType",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "PromptTuningInit",
    "TaskType",
    "TrainableTokensConfig",
    "compose_cartridge_adapters",
    "config_class",
    "get_peft_config",
    "initialize_kv_prefix_from_past_key_values",
    "initialize_kv_prefix_from_text",
    "method_for",
]
