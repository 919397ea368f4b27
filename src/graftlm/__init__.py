"""GraftLM: many small adapters on one frozen language model.

The names below are loaded when they are first used, so that `import graftlm` (and the command line's help) is immediate.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registering import register_on_demand
from .version import __version__

if TYPE_CHECKING:
    from . import as_peft
    from .architectures.prepacked import prepacked
    from .checkpoint import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
    from .compat.encoders import (
        PrefixEncoder,
        PromptEmbedding,
        PromptEncoder,
    )
    from .compat.helpers import (
        cast_mixed_precision_params,
        get_base_model_state_dict,
        get_layer_status,
        get_model_status,
        set_base_model_state_dict,
        shift_tokens_right,
    )
    from .compat.mappings import (
        MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )
    from .compat.tasks import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
        PeftMixedModel,
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
    )
    from .compat.tuners import (
        IA3Model,
        LoHaModel,
        LoraModel,
    )
    from .converting import convert_to_lora, save_as_lora
    from .injecting import inject_adapter_in_model
    from .methods import (
        AdaLoraConfig,
        AdaptionPromptConfig,
        BOFTConfig,
        BottleneckConfig,
        BottleneckPlacement,
        FourierFTConfig,
        IA3Config,
        LNTuningConfig,
        LoftQConfig,
        LoHaConfig,
        LoKrConfig,
        LoraConfig,
        MissConfig,
        MultitaskPromptTuningConfig,
        MultitaskPromptTuningInit,
        OFTConfig,
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
        TrainableTokensConfig,
        VeraConfig,
        get_peft_config,
    )
    from .model import PeftModel, get_peft_model
    from .preparation import prepare_model_for_kbit_training
    from .training import RankSchedule, Trainer, train_together
    from .utils import (
        NoMatchingPeftModuleError,
        PeftError,
        PeftWarning,
    )

_HOME = {
    "AdaLoraConfig": ".methods",
    "AdaptionPromptConfig": ".methods",
    "AutoPeftModel": ".compat.tasks",
    "AutoPeftModelForCausalLM": ".compat.tasks",
    "AutoPeftModelForFeatureExtraction": ".compat.tasks",
    "AutoPeftModelForQuestionAnswering": ".compat.tasks",
    "AutoPeftModelForSeq2SeqLM": ".compat.tasks",
    "AutoPeftModelForSequenceClassification": ".compat.tasks",
    "AutoPeftModelForTokenClassification": ".compat.tasks",
    "BOFTConfig": ".methods",
    "BottleneckConfig": ".methods",
    "BottleneckPlacement": ".methods",
    "FourierFTConfig": ".methods",
    "IA3Config": ".methods",
    "IA3Model": ".compat.tuners",
    "LNTuningConfig": ".methods",
    "LoHaConfig": ".methods",
    "LoHaModel": ".compat.tuners",
    "LoKrConfig": ".methods",
    "LoftQConfig": ".methods",
    "LoraConfig": ".methods",
    "LoraModel": ".compat.tuners",
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING": ".compat.mappings",
    "MissConfig": ".methods",
    "MultitaskPromptTuningConfig": ".methods",
    "MultitaskPromptTuningInit": ".methods",
    "NoMatchingPeftModuleError": ".utils",
    "OFTConfig": ".methods",
    "PEFT_TYPE_TO_CONFIG_MAPPING": ".compat.mappings",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING": ".compat.mappings",
    "PEFT_TYPE_TO_TUNER_MAPPING": ".compat.mappings",
    "PeftConfig": ".methods",
    "PeftError": ".utils",
    "PeftMixedModel": ".compat.tasks",
    "PeftModel": ".model",
    "PeftModelForCausalLM": ".compat.tasks",
    "PeftModelForFeatureExtraction": ".compat.tasks",
    "PeftModelForQuestionAnswering": ".compat.tasks",
    "PeftModelForSeq2SeqLM": ".compat.tasks",
    "PeftModelForSequenceClassification": ".compat.tasks",
    "PeftModelForTokenClassification": ".compat.tasks",
    "PeftType": ".methods",
    "PeftWarning": ".utils",
    "PrefixEncoder": ".compat.encoders",
    "PrefixTuningConfig": ".methods",
    "PromptEmbedding": ".compat.encoders",
    "PromptEncoder": ".compat.encoders",
    "PromptEncoderConfig": ".methods",
    "PromptEncoderReparameterizationType": ".methods",
    "PromptLearningConfig": ".methods",
    "PromptTuningConfig": ".methods",
    "PromptTuningInit": ".methods",
    "RandLoraConfig": ".methods",
    "RankSchedule": ".training",
    "TaskType": ".methods",
    "TrainableTokensConfig": ".methods",
    "Trainer": ".training",
    "VeraConfig": ".methods",
    "cast_mixed_precision_params": ".compat.helpers",
    "convert_to_lora": ".converting",
    "get_base_model_state_dict": ".compat.helpers",
    "get_layer_status": ".compat.helpers",
    "get_model_status": ".compat.helpers",
    "get_peft_config": ".methods",
    "get_peft_model": ".model",
    "get_peft_model_state_dict": ".checkpoint",
    "inject_adapter_in_model": ".injecting",
    "load_peft_weights": ".checkpoint",
    "prepacked": ".architectures.prepacked",
    "prepare_model_for_kbit_training": ".preparation",
    "save_as_lora": ".converting",
    "set_base_model_state_dict": ".compat.helpers",
    "set_peft_model_state_dict": ".checkpoint",
    "shift_tokens_right": ".compat.helpers",
    "train_together": ".training",
}

__all__ = [
    "AdaLoraConfig",
    "AdaptionPromptConfig",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BOFTConfig",
    "BottleneckConfig",
    "BottleneckPlacement",
    "FourierFTConfig",
    "IA3Config",
    "IA3Model",
    "LNTuningConfig",
    "LoHaConfig",
    "LoHaModel",
    "LoKrConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraModel",
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "MissConfig",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "NoMatchingPeftModuleError",
    "OFTConfig",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "PeftConfig",
    "PeftError",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PeftWarning",
    "PrefixEncoder",
    "PrefixTuningConfig",
    "PromptEmbedding",
    "PromptEncoder",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "PromptTuningInit",
    "RandLoraConfig",
    "RankSchedule",
    "TaskType",
    "TrainableTokensConfig",
    "Trainer",
    "VeraConfig",
    "__version__",
    "as_peft",
    "cast_mixed_precision_params",
    "convert_to_lora",
    "get_base_model_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "load_peft_weights",
    "prepacked",
    "prepare_model_for_kbit_training",
    "save_as_lora",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "shift_tokens_right",
    "train_together",
]


def __getattr__(name: str) -> Any:
    if name in ("utils", "as_peft"):  # `graftlm.utils.…` after a plain `import graftlm`, as with HF PEFT
        return import_module(f".{name}", __name__)
    if name in _HOME:
        import_module(".architectures", __name__)  # makes the architectures that are ours known to transformers
        return getattr(import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


register_on_demand()
