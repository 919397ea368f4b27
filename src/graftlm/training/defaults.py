"""What a recipe takes where it says nothing: learning rate, epochs and batch size by rule, and better start values.

Learning rates follow the shape of the base, REFERENCE and LAYERS being SmolLM2-135M's::

    rate = learning_rate * (REFERENCE / width) ** power * (LAYERS / layers) ** depth        at most HIGHEST

What of it is measured is in docs/dev-log.md (`benchmarks/defaults.py`), and docs/recipes.md says how. Start values: soft
prompts that start at random learn slowly and end lower, so recipes start them from the base model. LoRA goes on all linear
layers, which learns more than attention alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError, nearest
from ..methods import METHODS, PeftConfig, PeftType

REFERENCE, LAYERS = 576, 30  # width and depth for which learning rates are written down
HIGHEST = 0.3


@dataclass(frozen=True, kw_only=True)
class MethodDefaults:
    """Defaults of one method.

    Attributes:
        learning_rate: for AdamW, on a base of width `REFERENCE` and `LAYERS` layers.
        power, depth: how fast it falls with the width and with the layers.
        options: configuration fields that differ from the library's defaults in recipes.
        text_init: fields that start the adapter from a text; used where the recipe names no other start.
        needs: a field that a recipe must give, as there is no default for it ("" for none): `compare` leaves the method out
            of `every`.
    """

    learning_rate: float
    power: float
    depth: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    text_init: dict[str, Any] = field(default_factory=dict)
    needs: str = ""

    def rate(self, width: int, layers: int = LAYERS) -> float:
        """The learning rate on a base of a shape, to two digits."""
        value = self.learning_rate * (REFERENCE / width) ** self.power * (LAYERS / layers) ** self.depth
        return float(f"{min(value, HIGHEST):.1e}")


DEFAULTS: dict[PeftType, MethodDefaults] = {
    PeftType.LORA: MethodDefaults(learning_rate=1e-3, power=0.8, options={"target_modules": "all-linear"}),
    PeftType.PROMPT_TUNING: MethodDefaults(learning_rate=3e-2, power=1.0, options={"prompt_tuning_init": "SAMPLE_VOCAB"}),
    PeftType.MULTITASK_PROMPT_TUNING: MethodDefaults(learning_rate=3e-2, power=1.0),  # a guess
    PeftType.P_TUNING: MethodDefaults(
        learning_rate=1e-3, power=1.0, options={"init_weights": "vocab"}, text_init={"init_weights": "text"}
    ),
    # every layer has a prefix of its own, so what a step changes goes with their number and not with the width
    PeftType.PREFIX_TUNING: MethodDefaults(learning_rate=1e-2, power=0.0, depth=2.0, text_init={"init_weights": "text"}),
    PeftType.CARTRIDGE: MethodDefaults(learning_rate=1e-2, power=0.0, depth=2.0),  # a guess: Prefix Tuning's
    PeftType.BOTTLENECK: MethodDefaults(learning_rate=1e-3, power=0.8),
    PeftType.IA3: MethodDefaults(learning_rate=1e-2, power=0.8),
    PeftType.ADAPTION_PROMPT: MethodDefaults(learning_rate=1e-2, power=0.8),  # a guess
    PeftType.TRAINABLE_TOKENS: MethodDefaults(learning_rate=1e-3, power=0.8, needs="token_indices"),  # a guess
    # guesses, of the following four
    PeftType.MISS: MethodDefaults(learning_rate=3e-4, power=0.8, options={"target_modules": "all-linear"}),
    PeftType.OFT: MethodDefaults(learning_rate=1e-3, power=0.8, options={"target_modules": "all-linear"}),
    PeftType.BOFT: MethodDefaults(learning_rate=5e-3, power=0.8, options={"target_modules": "all-linear"}),
    PeftType.ADALORA: MethodDefaults(learning_rate=3e-3, power=0.8, options={"target_modules": "all-linear"}),
    PeftType.LOHA: MethodDefaults(learning_rate=2e-3, power=0.8, options={"target_modules": "all-linear"}),
    # by three rates each, in one run of 40 updates on graftlm-base (width 256): LoKr's and RandLoRA's the best, the others
    # below the highest that was tried, which was the best; the powers are guesses, LoRA's
    PeftType.VERA: MethodDefaults(learning_rate=5e-2, power=0.8, options={"target_modules": "all-linear"}),
    PeftType.LOKR: MethodDefaults(learning_rate=1.5e-2, power=0.8, options={"target_modules": "all-linear"}),
    PeftType.RANDLORA: MethodDefaults(learning_rate=1.5e-3, power=0.8, options={"target_modules": "all-linear"}),
    PeftType.FOURIERFT: MethodDefaults(
        learning_rate=1e-1, power=0.8, options={"target_modules": "all-linear", "init_weights": True}
    ),
    PeftType.LN_TUNING: MethodDefaults(learning_rate=2e-2, power=0.8),
}
OTHER = MethodDefaults(learning_rate=1e-3, power=0.8)


def batch_size_for(rows: int) -> int:
    """Rows a step: fewer where there are few, so that they make enough updates."""
    return 2 if rows < 32 else 4 if rows < 128 else 8


def epochs_for(rows: int, batch: int) -> int:
    """Passes over the data: as many as make about `UPDATES` updates, within bounds. batch: rows an update."""
    return min(max(math.ceil(UPDATES * batch / max(rows, 1)), FEWEST), MOST)


UPDATES, FEWEST, MOST = 150, 3, 10

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


def methods_in_words() -> str:
    """What a recipe's `method` may be, for help texts."""
    return f"{', '.join(method_names())}; lora-int8, qlora: LoRA over int8, nf4"


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
