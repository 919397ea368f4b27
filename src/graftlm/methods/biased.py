"""What MiSS, OFT and BOFT share beside LoRA: only some of the base's layers, and biases that are trained along."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import ConfigError
from .fields import check_expressions
from .layered import LayerConfig, LayerMethod
from .lora import Lora


@dataclass(kw_only=True)
class BiasedConfig(LayerConfig):
    """Fields of such a method.

    Args:
        bias: "none", "all", or the method's own word for the biases of the layers that it changes.
        layers_to_transform, layers_pattern: only layers with these numbers (in a module list of that name).
    """

    bias: str = "none"
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    own_biases: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bias not in ("none", "all", self.own_biases):
            raise ConfigError(f"bias={self.bias!r}: expected 'none', 'all' or {self.own_biases!r}.")
        for pattern in [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or ():
            check_expressions("layers_pattern", pattern)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern is given without layers_to_transform; name the layers' numbers there.")


class Biased(Lora):
    """One such adapter in a host: as LoRA's but for its change."""

    kinds = LayerMethod.kinds
    takes = LayerMethod.takes

    @property
    def own_biases(self) -> str:  # type: ignore[override]
        return self.config.own_biases  # type: ignore[attr-defined]
