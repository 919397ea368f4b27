"""Configurations of LoRA's start values that come from data: EVA, CorDA, LoRA-GA. Fields and defaults are HF PEFT's."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ConfigError, nearest

KEPT = ("corda", "lora_ga")  # starts that are in the file
OWN_FIELDS = frozenset(
    {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights", "corda_config", "lora_ga_config"}
)


@dataclass(kw_only=True)
class EvaConfig:
    """How EVA's start is made (see `lora_eva`).

    Args:
        rho: a layer's rank may become up to rho times as large.
        tau: cosine similarity from which a direction counts as found.
        use_label_mask, label_mask_value: leave tokens out whose label is that value.
        whiten: divide directions by the square root of their singular values.
        adjust_scaling_factors: keep alpha / r where ranks change.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        if self.rho < 1:
            raise ConfigError(f"rho={self.rho!r}: `rho` must be >= 1.0.")
        if not 0 <= self.tau <= 1:
            raise ConfigError(f"tau={self.tau!r}: `tau` must be between 0.0 and 1.0.")


@dataclass(kw_only=True)
class CordaConfig:
    """How CorDA's start is made.

    Args:
        cache_file, covariance_file: where the factors and the covariances are kept and found again (safetensors).
        corda_method: "ipm" (the largest directions) or "kpm" (the smallest, which keep what the base knows).
        verbose: HF PEFT's; without meaning here.
        use_float16_for_covariance: half the memory, less precise.
        prune_temporary_fields: take covariances off the modules afterwards.
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self) -> None:
        one_of("corda_method", self.corda_method, ("ipm", "kpm"))


@dataclass(kw_only=True)
class LoraGAConfig:
    """How LoRA-GA's start is made of a gradient's singular directions.

    Args:
        direction: which of the first 2r directions A and B get: "ArBr" (A odd ones, B even ones), "A2rBr" (A the second
            half), "ArB2r" (A the first half), "random" (both the same).
        scale: "stable" (by `stable_gamma`), "weight_svd" (as the weight's largest singular value), "gd_scale", "unit".
    """

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: int = 16

    def __post_init__(self) -> None:
        one_of("direction", self.direction, ("ArBr", "A2rBr", "ArB2r", "random"))
        one_of("scale", self.scale, ("stable", "weight_svd", "gd_scale", "unit"))


def one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name}={value!r}: expected one of {', '.join(known)}.")


def sub_config(kind: Any, name: str, value: Any) -> Any:
    """A configuration of that kind, out of one, a dictionary, HF PEFT's object, or None."""
    if value is None or isinstance(value, kind):
        return value
    values = value if isinstance(value, dict) else vars(value) if type(value).__name__ == kind.__name__ else None
    if values is None:
        raise ConfigError(f"{name}={value!r}: expected a {kind.__name__}, its fields as a dictionary, or None.")
    unknown = sorted(values.keys() - kind.__dataclass_fields__.keys())
    if unknown:
        known = kind.__dataclass_fields__
        raise ConfigError(f"{name} has no field {unknown[0]!r}{nearest(unknown[0], known)}; it has {', '.join(known)}.")
    return kind(**values)


def check_data_start(config: Any) -> None:
    """The configuration of a start from data; its defaults where there is none."""
    for init, kind in (("eva", EvaConfig), ("corda", CordaConfig), ("lora_ga", LoraGAConfig)):
        field = f"{init}_config"
        found = sub_config(kind, field, getattr(config, field))
        if found is not None and init != config.init_lora_weights:
            warnings.warn(f"`{field}` specified but will be ignored when `init_lora_weights` is not '{init}'.", stacklevel=5)
        setattr(config, field, kind() if found is None and init == config.init_lora_weights else found)
    if config.init_lora_weights in KEPT:
        config.__dict__["own_fields"] = OWN_FIELDS
