"""Which names of HF PEFT there are here, where they live, and why others are not here.

Every public name of HF PEFT's (`peft.__all__`, `peft.utils.__all__`) is a name of `graftlm` or `graftlm.utils`, or stands
in `ABSENT` with the reason; `tests/test_names.py` holds it, and docs/migration.md is made from it.
`MODULES` says what `graftlm.as_peft` puts under the names of HF PEFT's modules.
"""

from __future__ import annotations

VERSION = "0.21.2"  # of HF PEFT, whose names these are

# -- what is not here ----------------------------------------------------------------------------------------------------
METHOD = "a method that is not here"
PART = "a variant of LoRA that is not here"
SHAPES = "prefix shapes are read from the attention modules"
INTERNAL = "inner work of HF PEFT's, which has no counterpart here"
COMING = "coming"

_METHODS = (
    "Adamss", "Beft", "C3A", "Deft", "Delora", "Frod", "Glora", "Gralora", "HRA", "Hira", "Lily", "OSF", "Peanut", "Poly",
    "Psoft", "Pvera", "Road", "Shadow", "Shira", "Supertuning", "TinyLora", "UniLora", "VBLoRA", "WaveFT", "XLora",
)  # fmt: skip
_COMING = (
    "AdaLora", "AdaptionPrompt", "BOFT", "FourierFT", "LNTuning", "LoKr", "Miss", "OFT", "RandLora", "TrainableTokens",
    "Vera",
)  # fmt: skip
_VARIANTS = ("ArrowConfig", "BdLoraConfig", "KasaConfig", "MontecloraConfig", "VeloraConfig", "create_arrow_model")
_INTERNAL = (
    "_get_input_embeddings_name", "_is_valid_match", "_prepare_prompt_learning_config", "_set_adapter", "_set_trainable",
    "_freeze_adapter", "set_additional_trainable_modules", "get_gptqmodel_quant_linear", "get_quantization_config",
    "get_quantization_kwargs", "quantization_extra_repr", "resolve_quantization_backend",
)  # fmt: skip

ABSENT: dict[str, str] = {
    **{f"{name}{kind}": METHOD for name in _METHODS for kind in ("Config", "Model")},
    **{f"TRANSFORMERS_MODELS_TO_{name.upper()}_TARGET_MODULES_MAPPING": METHOD for name in _METHODS},
    **dict.fromkeys(_VARIANTS, PART),
    "LoraRuntimeConfig": "offloading while DoRA starts; a start here needs no copy of the base",
    "find_kappa_target_modules": "a choice of layers by the condition of their weights; name them in target_modules",
    "replace_lora_weights_loftq": "LoftQ is done as adapters are attached: LoraConfig(init_lora_weights='loftq')",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING": SHAPES,
    "bloom_model_postprocess_past_key_value": SHAPES,
    "map_cache_to_layer_device_map": SHAPES,
    "WEIGHTS_NAME": "the name of a pickle; weights are safetensors (SAFETENSORS_WEIGHTS_NAME)",
    **dict.fromkeys(_INTERNAL, INTERNAL),
}

# Names that are being written. What has come and still stands here counts as come.
TO_COME: frozenset[str] = frozenset(
    {
        *(f"{name}{kind}" for name in _COMING for kind in ("Config", "Model")),
        *(f"TRANSFORMERS_MODELS_TO_{name.upper()}_TARGET_MODULES_MAPPING" for name in _COMING),
        "CPTConfig", "CPTEmbedding", "CartridgeConfig", "CartridgeEncoder", "MultitaskPromptTuningConfig",
        "MultitaskPromptTuningInit", "compose_cartridge_adapters", "initialize_kv_prefix_from_past_key_values",
        "initialize_kv_prefix_from_text", "prompt_embeddings_from_past_key_values", "TrainableTokensWrapper",
        "EvaConfig", "LoraGAConfig", "get_eva_state_dict", "initialize_lora_eva_weights", "preprocess_loraga",
        "convert_to_lora", "save_as_lora", "inject_adapter_in_model",
    }
)  # fmt: skip

# -- what goes by the names of HF PEFT's modules --------------------------------------------------------------------------
# Every module also has the names of `graftlm` and `graftlm.utils`; here stand those that only it has, and where they live.
_LAYERS = {name: f"compat.tuners:{name}" for name in ("LoraLayer", "Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d")}
_BASES = {name: f"compat.tuners:{name}" for name in ("BaseTuner", "BaseTunerLayer")}
_MAPPINGS = {
    name: f"compat.mappings:{name}"
    for name in (
        "PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
        "PEFT_TYPE_TO_PREFIX_MAPPING", "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    )
}  # fmt: skip

MODULES: dict[str, dict[str, str]] = {
    "": {},
    "auto": {},
    "config": {},
    "functional": {},
    "helpers": {"check_if_peft_model": "compat.helpers:check_if_peft_model"},
    "import_utils": {},
    "mapping": _MAPPINGS,
    "mapping_func": _MAPPINGS,
    "mixed_model": {},
    "peft_model": {},
    "tuners": {},
    "tuners.ia3": {},
    "tuners.loha": {},
    "tuners.lora": _LAYERS,
    "tuners.lora.config": {},
    "tuners.lora.layer": _LAYERS,
    "tuners.lora.model": _LAYERS,
    "tuners.p_tuning": {},
    "tuners.prefix_tuning": {},
    "tuners.prompt_tuning": {},
    "tuners.tuners_utils": _BASES,
    "utils": {},
    "utils.constants": {},
    "utils.hotswap": {},
    "utils.integrations": {},
    "utils.other": {},
    "utils.peft_types": {},
    "utils.save_and_load": {},
    "utils.transformers_weight_conversion": {"build_peft_weight_mapping": "compat.helpers:build_peft_weight_mapping"},
    "utils.warning": {},
}


def reason(name: str) -> str | None:
    """Why a name of HF PEFT's is not here; None for one that HF PEFT does not have either (or that is here)."""
    return COMING if name in TO_COME else ABSENT.get(name)
