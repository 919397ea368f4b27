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
    from .converting import convert_to_lora, save_as_lora
    from .methods import (
        BottleneckConfig,
        BottleneckPlacement,
        FourierFTConfig,
        IA3Config,
        LNTuningConfig,
        LoftQConfig,
        LoHaConfig,
        LoKrConfig,
        LoraConfig,
        PeftConfig,
        PeftType,
        PrefixTuningConfig,
        PromptEncoderConfig,
        PromptEncoderReparameterizationType,
        PromptLearningConfig,
        PromptTuningConfig,
        PromptTuningInit,
        RandLoraConfig,
        TaskType,
        VeraConfig,
        get_peft_config,
    )
    from .model import PeftModel, get_peft_model
    from .preparation import prepare_model_for_kbit_training
    from .training import Trainer, train_together

_HOME = {
    "BottleneckConfig": ".methods",
    "BottleneckPlacement": ".methods",
    "FourierFTConfig": ".methods",
    "IA3Config": ".methods",
    "LNTuningConfig": ".methods",
    "LoHaConfig": ".methods",
    "LoKrConfig": ".methods",
    "LoftQConfig": ".methods",
    "LoraConfig": ".methods",
    "PeftConfig": ".methods",
    "PeftModel": ".model",
    "PeftType": ".methods",
    "PrefixTuningConfig": ".methods",
    "PromptEncoderConfig": ".methods",
    "PromptEncoderReparameterizationType": ".methods",
    "PromptLearningConfig": ".methods",
    "PromptTuningConfig": ".methods",
    "PromptTuningInit": ".methods",
    "RandLoraConfig": ".methods",
    "TaskType": ".methods",
    "Trainer": ".training",
    "VeraConfig": ".methods",
    "convert_to_lora": ".converting",
    "get_peft_config": ".methods",
    "get_peft_model": ".model",
    "get_peft_model_state_dict": ".checkpoint",
    "load_peft_weights": ".checkpoint",
    "prepacked": ".architectures.prepacked",
    "prepare_model_for_kbit_training": ".preparation",
    "save_as_lora": ".converting",
    "set_peft_model_state_dict": ".checkpoint",
    "train_together": ".training",
}

__all__ = [
    "BottleneckConfig",
    "BottleneckPlacement",
    "FourierFTConfig",
    "IA3Config",
    "LNTuningConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoftQConfig",
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
    "RandLoraConfig",
    "TaskType",
    "Trainer",
    "VeraConfig",
    "__version__",
    "convert_to_lora",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "load_peft_weights",
    "prepacked",
    "prepare_model_for_kbit_training",
    "save_as_lora",
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
