"""What a recipe takes per method where it says nothing: learning rates found by measurement, and better start values.

The learning rates of the bundled base are measured on the bundled tweets (`recipes/learning_rates.py`, docs/dev-log.md).
Start values: soft prompts that start at random learn slowly and end lower, so recipes start them from the base model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError, nearest
from ..methods import METHODS, PeftConfig, PeftType


@dataclass(frozen=True, kw_only=True)
class MethodDefaults:
    """Defaults of one method.

    Attributes:
        learning_rate: for AdamW, on bases of ordinary size: what the methods' papers and the documents use.
        bundled_rate: on the bundled base of ten million parameters, measured (docs/dev-log.md); it takes larger steps.
        options: configuration fields that differ from the library's defaults in recipes.
        text_init: fields that start the adapter from a text; used where the recipe names no other start.
    """

    learning_rate: float
    bundled_rate: float
    options: dict[str, Any] = field(default_factory=dict)
    text_init: dict[str, Any] = field(default_factory=dict)


DEFAULTS: dict[PeftType, MethodDefaults] = {
    PeftType.LORA: MethodDefaults(learning_rate=2e-4, bundled_rate=3e-3),
    PeftType.PROMPT_TUNING: MethodDefaults(
        learning_rate=3e-3, bundled_rate=3e-2, options={"prompt_tuning_init": "SAMPLE_VOCAB"}
    ),
    PeftType.P_TUNING: MethodDefaults(learning_rate=1e-3, bundled_rate=2e-3),
    PeftType.PREFIX_TUNING: MethodDefaults(learning_rate=5e-3, bundled_rate=5e-2, text_init={"init_weights": "text"}),
    PeftType.BOTTLENECK: MethodDefaults(learning_rate=3e-4, bundled_rate=2e-3),
}
OTHER = MethodDefaults(learning_rate=1e-3, bundled_rate=1e-3)

# Fields that a run fills in by itself.
HIDDEN_FIELDS = frozenset(
    {"task_type", "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"}
)


def method_names() -> dict[str, PeftType]:
    """Names of the methods in recipes: `lora`, `prompt-tuning`, …"""
    return {kind.value.lower().replace("_", "-"): kind for kind in METHODS}


ALIASES = {"p-tuning-v2": "prefix-tuning", "adapters": "bottleneck"}
# Names that say a method and how its base is quantised.
QUANTIZED = {"lora-int8": ("lora", "int8"), "qlora": ("lora", "nf4")}


def plain_name(name: object) -> str:
    """A method's name as the tables here spell it."""
    return str(name).lower().replace("_", "-").replace(" ", "-")


def method_type(name: str) -> PeftType:
    """The method of a recipe's name (any case, `_` or `-`, and the aliases above).

    Raises:
        ConfigError: an unknown name.
    """
    names = method_names()
    plain = plain_name(name)
    plain = ALIASES.get(plain, plain)
    if plain not in names:
        known = [*names, *ALIASES, *QUANTIZED]
        raise ConfigError(f"unknown method {name!r}; expected one of {', '.join(names)}{nearest(plain, known)}")
    return names[plain]


def config_type(name: str) -> type[PeftConfig]:
    """The configuration class of a recipe's method name."""
    return METHODS[method_type(name)][0]


def defaults_of(name: str) -> MethodDefaults:
    """The recipe defaults of a method."""
    return DEFAULTS.get(method_type(name), OTHER)
