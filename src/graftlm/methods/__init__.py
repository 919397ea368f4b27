"""The registry of methods: importing a file here makes its method known. A new method is its file and a line below."""

from .adalora import AdaLoraConfig
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
from .boft import BOFTConfig
from .bottleneck import BottleneckConfig, BottleneckPlacement
from .cartridge import (
    CartridgeConfig,
    compose_cartridge_adapters,
    initialize_kv_prefix_from_past_key_values,
    initialize_kv_prefix_from_text,
    prompt_embeddings_from_past_key_values,
)
from .fourierft import FourierFTConfig
from .ia3 import IA3Config
from .ln_tuning import LNTuningConfig
from .loha import LoHaConfig
from .lokr import LoKrConfig
from .lora import LoftQConfig, LoraConfig
from .lora_data_config import CordaConfig, EvaConfig, LoraGAConfig
from .lora_data_init import preprocess_corda, preprocess_loraga
from .lora_eva import get_eva_state_dict, initialize_lora_eva_weights
from .miss import MissConfig
from .multitask_prompt_tuning import MultitaskPromptTuningConfig, MultitaskPromptTuningInit
from .oft import OFTConfig
from .p_tuning import PromptEncoderConfig, PromptEncoderReparameterizationType
from .prefix_tuning import PrefixTuningConfig
from .prompt_tuning import PromptTuningConfig, PromptTuningInit
from .randlora import RandLoraConfig
from .trainable_tokens import TrainableTokensConfig
from .vera import VeraConfig

__all__ = [
    "AdaLoraConfig",
    "AdaptionPromptConfig",
    "BOFTConfig",
    "BottleneckConfig",
    "BottleneckPlacement",
    "CartridgeConfig",
    "CordaConfig",
    "EvaConfig",
    "FourierFTConfig",
    "IA3Config",
    "LNTuningConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "METHODS",
    "Method",
    "MissConfig",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "OFTConfig",
    "PeftConfig",
    "PeftType",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "PromptTuningInit",
    "RandLoraConfig",
    "TaskType",
    "TrainableTokensConfig",
    "VeraConfig",
    "compose_cartridge_adapters",
    "config_class",
    "get_eva_state_dict",
    "get_peft_config",
    "initialize_kv_prefix_from_past_key_values",
    "initialize_kv_prefix_from_text",
    "initialize_lora_eva_weights",
    "method_for",
    "preprocess_corda",
    "preprocess_loraga",
    "prompt_embeddings_from_past_key_values",
]
