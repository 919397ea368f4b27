"""Which names of HF PEFT there are here, where they live, and why others are not here.

Every public name of HF PEFT's (`peft.__all__`, `peft.utils.__all__`) is a name of `graftlm` or `graftlm.utils`, or stands
in `ABSENT` with the reason; `tests/test_names.py` holds it, and docs/migration.md is made from it.
`MODULES` says what `graftlm.as_peft` puts under the names of HF PEFT's modules.
"""

from __future__ import annotations

from ..version import PEFT_VERSION

VERSION = PEFT_VERSION

# -- what is not here ----------------------------------------------------------------------------------------------------
METHOD = "a method that is not here"
PART = "a variant of LoRA that is not here"
SHAPES = "prefix shapes are read from the attention modules"
INTERNAL = "inner work of HF PEFT's, which has no counterpart here"
MAPPING = "TRANSFORMERS_MODELS_TO_"  # each method's default layers by family: there where the method is

_METHODS = (
    "Adamss", "Beft", "C3A", "Deft", "Delora", "Frod", "Glora", "Gralora", "HRA", "Hira", "Lily", "OSF", "Peanut", "Poly",
    "Psoft", "Pvera", "Road", "Shadow", "Shira", "Supertuning", "TinyLora", "UniLora", "VBLoRA", "WaveFT", "XLora",
)  # fmt: skip
_VARIANTS = ("ArrowConfig", "BdLoraConfig", "KasaConfig", "MontecloraConfig", "VeloraConfig", "create_arrow_model")
_INTERNAL = (
    "_get_input_embeddings_name", "_is_valid_match", "_prepare_prompt_learning_config", "_set_adapter", "_set_trainable",
    "_freeze_adapter", "set_additional_trainable_modules", "get_gptqmodel_quant_linear", "get_quantization_config",
    "get_quantization_kwargs", "quantization_extra_repr", "resolve_quantization_backend",
)  # fmt: skip

ABSENT: dict[str, str] = {
    **{f"{name}{kind}": METHOD for name in _METHODS for kind in ("Config", "Model")},
    **{f"{MAPPING}{name.upper()}_TARGET_MODULES_MAPPING": METHOD for name in _METHODS},
    **dict.fromkeys(_VARIANTS, PART),
    **dict.fromkeys(("CPTConfig", "CPTEmbedding"), METHOD),
    "CartridgeEncoder": "the table of graftlm.CartridgeConfig, which is not built by itself",
    "LoraRuntimeConfig": "offloading while DoRA starts; a start here needs no copy of the base",
    "find_kappa_target_modules": "a choice of layers by the condition of their weights; name them in target_modules",
    "replace_lora_weights_loftq": "LoftQ is done as adapters are attached: LoraConfig(init_lora_weights='loftq')",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING": SHAPES,
    "bloom_model_postprocess_past_key_value": SHAPES,
    "map_cache_to_layer_device_map": SHAPES,
    "WEIGHTS_NAME": "the name of a pickle; weights are safetensors (SAFETENSORS_WEIGHTS_NAME)",
    **dict.fromkeys(_INTERNAL, INTERNAL),
}

# -- what goes by the names of HF PEFT's modules --------------------------------------------------------------------------
# Every module also has the names of `graftlm` and `graftlm.utils`; here stand those that only it has, and where they live.
_LAYERS = {name: f"compat.tuners:{name}" for name in ("LoraLayer", "Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d")}
_SWAP = ("hotswap_adapter", "hotswap_adapter_from_state_dict", "check_hotswap_configs_compatible")
_BASES = {name: f"compat.tuners:{name}" for name in ("BaseTuner", "BaseTunerLayer")}
_MATCHING = {name: f"compat.helpers:{name}" for name in ("check_target_module_exists", "inspect_matched_modules")}
_MAPPINGS = {
    name: f"compat.mappings:{name}"
    for name in (
        "PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
        "PEFT_TYPE_TO_PREFIX_MAPPING", "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    )
}  # fmt: skip

_TUNERS = (
    "adalora", "adaption_prompt", "boft", "cartridge", "fourierft", "ia3", "ln_tuning", "loha", "lokr", "miss",
    "multitask_prompt_tuning", "oft", "p_tuning", "prefix_tuning", "prompt_tuning", "randlora", "trainable_tokens", "vera",
)  # fmt: skip

MODULES: dict[str, dict[str, str]] = {
    "": {},
    "auto": {},
    "config": {},
    "functional": {
        name: f"functional:{name}" for name in ("cast_adapter_dtype", "delete_adapter", "set_adapter", "set_requires_grad")
    },
    "helpers": {
        "check_if_peft_model": "compat.helpers:check_if_peft_model",
        "rescale_adapter_scale": "helpers:rescale_adapter_scale",
    },
    "import_utils": {},
    "mapping": _MAPPINGS,
    "mapping_func": _MAPPINGS,
    "mixed_model": {},
    "optimizers": {"create_loraplus_optimizer": "compat.optimizers:create_loraplus_optimizer"},
    "peft_model": {},
    "tuners": {},
    **{f"tuners.{name}": {} for name in _TUNERS},
    **dict.fromkeys(
        ("tuners.trainable_tokens", "tuners.trainable_tokens.layer"),
        {"TrainableTokensLayer": "compat.tuners:TrainableTokensLayer"},
    ),
    "tuners.lora": _LAYERS,
    "tuners.lora.config": {},
    "tuners.lora.conversion": {},
    "tuners.lora.corda": {"preprocess_corda": "methods:preprocess_corda"},
    "tuners.lora.eva": {},
    "tuners.lora.layer": _LAYERS,
    "tuners.lora.loraga": {},
    "tuners.lora.model": _LAYERS,
    "tuners.tuners_utils": {**_BASES, **_MATCHING},
    "utils": {},
    "utils.constants": {"DUMMY_MODEL_CONFIG": "compat.tuners:DUMMY_MODEL_CONFIG"},
    "utils.hotswap": {name: f"hotswap:{name}" for name in _SWAP},
    "utils.integrations": {},
    "utils.other": {},
    "utils.peft_types": {},
    "utils.save_and_load": {},
    "utils.transformers_weight_conversion": {"build_peft_weight_mapping": "compat.helpers:build_peft_weight_mapping"},
    "utils.warning": {},
}


def reason(name: str) -> str | None:
    """Why a name of HF PEFT's is not here; None for one that HF PEFT does not have either (or that is here)."""
    return ABSENT.get(name)
