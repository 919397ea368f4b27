"""GraftLM: many small adapters on one frozen language model.

The names below are loaded when they are first used, so that `import graftlm` (and the command line's help) is immediate.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registering import register_on_demand
from .version import __version__

if TYPE_CHECKING:
    from .architectures.prepacked import prepacked
    from .checkpoint import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
    from .methods import (
        AdaptionPromptConfig,
        BottleneckConfig,
        BottleneckPlacement,
        CartridgeConfig,
        IA3Config,
        LoftQConfig,
        LoHaConfig,
        LoraConfig,
        MultitaskPromptTuningConfig,
        MultitaskPromptTuningInit,
        PeftConfig,
        PeftType,
        PrefixTuningConfig,
        PromptEncoderConfig,
        PromptEncoderReparameterizationType,
        PromptLearningConfig,
        PromptTuningConfig,
        PromptTuningInit,
        TaskType,
        TrainableTokensConfig,
        compose_cartridge_adapters,
        get_peft_config,
        initialize_kv_prefix_from_past_key_values,
        initialize_kv_prefix_from_text,
    )
    from .model import PeftModel, get_peft_model
    from .preparation import prepare_model_for_kbit_training
    from .training import Trainer, train_together

_HOME = {
    "AdaptionPromptConfig": ".methods",
    "BottleneckConfig": ".methods",
    "BottleneckPlacement": ".methods",
    "CartridgeConfig": ".methods",
    "IA3Config": ".methods",
    "LoHaConfig": ".methods",
    "LoftQConfig": ".methods",
    "LoraConfig": ".methods",
    "MultitaskPromptTuningConfig": ".methods",
    "MultitaskPromptTuningInit": ".methods",
    "PeftConfig": ".methods",
    "PeftModel": ".model",
    "PeftType": ".methods",
    "PrefixTuningConfig": ".methods",
    "PromptEncoderConfig": ".methods",
    "PromptEncoderReparameterizationType": ".methods",
    "PromptLearningConfig": ".methods",
    "PromptTuningConfig": ".methods",
    "PromptTuningInit": ".methods",
    "TaskType": ".methods",
    "TrainableTokensConfig": ".methods",
    "Trainer": ".training",
    "compose_cartridge_adapters": ".methods",
    "get_peft_config": ".methods",
    "get_peft_model": ".model",
    "get_peft_model_state_dict": ".checkpoint",
    "initialize_kv_prefix_from_past_key_values": ".methods",
    "initialize_kv_prefix_from_text": ".methods",
    "load_peft_weights": ".checkpoint",
    "prepacked": ".architectures.prepacked",
    "prepare_model_for_kbit_training": ".preparation",
    "set_peft_model_state_dict": ".checkpoint",
    "train_together": ".training",
}

__all__ = [
    "AdaptionPromptConfig",
    "BottleneckConfig",
    "BottleneckPlacement",
    "CartridgeConfig",
    "IA3Config",
    "LoHaConfig",
    "LoftQConfig",
    "LoraConfig",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
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
    "TrainableTokensConfig",
    "Trainer",
    "__version__",
    "compose_cartridge_adapters",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "initialize_kv_prefix_from_past_key_values",
    "initialize_kv_prefix_from_text",
    "load_peft_weights",
    "prepacked",
    "prepare_model_for_kbit_training",
    "set_peft_model_state_dict",
    "train_together",
]


def __getattr__(name: str) -> Any:
    if name == "utils":  # `graftlm.utils.…` after a plain `import graftlm`, as with HF PEFT
        return import_module(".utils", __name__)
    if name in _HOME:
        import_module(".architectures", __name__)  # makes the architectures that are ours known to transformers
        return getattr(import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


register_on_demand()
