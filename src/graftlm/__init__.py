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
    from .helpers import rescale_adapter_scale
    from .hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
    from .methods import (
        BottleneckConfig,
        BottleneckPlacement,
        CordaConfig,
        EvaConfig,
        IA3Config,
        LoftQConfig,
        LoHaConfig,
        LoraConfig,
        LoraGAConfig,
        PeftConfig,
        PeftType,
        PrefixTuningConfig,
        PromptEncoderConfig,
        PromptEncoderReparameterizationType,
        PromptLearningConfig,
        PromptTuningConfig,
        PromptTuningInit,
        TaskType,
        get_eva_state_dict,
        get_peft_config,
        initialize_lora_eva_weights,
        preprocess_corda,
        preprocess_loraga,
    )
    from .model import PeftModel, get_peft_model
    from .preparation import prepare_model_for_kbit_training
    from .training import Trainer, train_together

_HOME = {
    "BottleneckConfig": ".methods",
    "BottleneckPlacement": ".methods",
    "CordaConfig": ".methods",
    "EvaConfig": ".methods",
    "IA3Config": ".methods",
    "LoHaConfig": ".methods",
    "LoftQConfig": ".methods",
    "LoraConfig": ".methods",
    "LoraGAConfig": ".methods",
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
    "Trainer": ".training",
    "get_eva_state_dict": ".methods",
    "get_peft_config": ".methods",
    "get_peft_model": ".model",
    "get_peft_model_state_dict": ".checkpoint",
    "hotswap_adapter": ".hotswap",
    "initialize_lora_eva_weights": ".methods",
    "load_peft_weights": ".checkpoint",
    "prepacked": ".architectures.prepacked",
    "prepare_model_for_compiled_hotswap": ".hotswap",
    "prepare_model_for_kbit_training": ".preparation",
    "preprocess_corda": ".methods",
    "preprocess_loraga": ".methods",
    "rescale_adapter_scale": ".helpers",
    "set_peft_model_state_dict": ".checkpoint",
    "train_together": ".training",
}

__all__ = [
    "BottleneckConfig",
    "BottleneckPlacement",
    "CordaConfig",
    "EvaConfig",
    "IA3Config",
    "LoHaConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
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
    "Trainer",
    "__version__",
    "get_eva_state_dict",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "initialize_lora_eva_weights",
    "load_peft_weights",
    "prepacked",
    "prepare_model_for_compiled_hotswap",
    "prepare_model_for_kbit_training",
    "preprocess_corda",
    "preprocess_loraga",
    "rescale_adapter_scale",
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
