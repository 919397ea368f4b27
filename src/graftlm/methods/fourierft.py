"""FourierFT: an update whose spectrum has few trained entries (arXiv:2405.03003, eq. 2 to 4).

``y = W x + b + scaling * Re(IDFT2(S)) x``: S [out, in] is zero but for n_frequency entries at places that a seed draws.
The entries start at random (standard normal), so an untrained adapter changes the base a little; `init_weights=True`
starts them at zero. Field names, defaults, maths and files are HF PEFT's; it also takes quantised layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..architectures import LORA_TARGETS
from ..errors import ConfigError, UnsupportedError
from ..layers import Change, Frozen, Held
from .base import PeftType, Site, register
from .fields import Count, Number, also_takes
from .layered import LayerConfig, LayerMethod
from .targets import pattern_value


@also_takes({"peft_version": ...})
@dataclass(kw_only=True)
class FourierFTConfig(LayerConfig):
    """Configuration of FourierFT.

    Args:
        n_frequency: trained entries of each layer's spectrum; at most out * in.
        scaling: what the update is multiplied by.
        random_loc_seed: seed of the entries' places.
        fan_in_fan_out: accepted for HF PEFT's sake; the layout is read from the module.
        bias: must be "none".
        layers_to_transform, layers_pattern: only layers with these numbers (in a module list of that name).
        n_frequency_pattern: other numbers of entries for modules that match a name or regular expression.
        init_weights: True starts the entries at zero, False at random.
    """

    n_frequency: Count = 1000
    scaling: Number = 150.0
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    bias: str = "none"
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    n_frequency_pattern: dict[str, Count] = field(default_factory=dict)
    init_weights: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.FOURIERFT
        if self.bias != "none":
            raise UnsupportedError(f"bias={self.bias!r}: biases are trained beside LoRA only; use 'none'.")


class Places(nn.Module):
    """Where a spectrum's trained entries stand in [out * in]: places [n]; in no file."""

    places: Tensor

    def __init__(self, places: Tensor) -> None:
        super().__init__()
        self.register_buffer("places", places, persistent=False)


class FourierChange(Change):
    """Of a linear layer.

    Args:
        config: a `FourierFTConfig`.
        count: trained entries.
        path: of the layer, for errors.
    """

    tables: ClassVar[tuple[str, ...]] = ("fourierft_spectrum", "fourierft_places")
    numbers = ("fourierft_n_frequency", "fourierft_scaling", "fourierft_random_loc_seed")

    def __init__(self, config: FourierFTConfig, count: int, frozen: Frozen, path: str) -> None:
        self.shape = frozen.shape
        self.fourierft_n_frequency = count
        self.fourierft_scaling = config.scaling
        self.fourierft_random_loc_seed = config.random_loc_seed
        self.zero = config.init_weights
        if count > self.shape[0] * self.shape[1]:
            raise ConfigError(
                f"n_frequency={count}: {path!r} has {self.shape[0]} x {self.shape[1]} = {self.shape[0] * self.shape[1]} "
                "places. Give fewer, or fewer for it in n_frequency_pattern."
            )

    def create(self, t: Held, frozen: Frozen, dtype: torch.dtype, initialise: bool) -> None:
        count = self.fourierft_n_frequency
        generator = torch.Generator().manual_seed(self.fourierft_random_loc_seed)
        places = torch.randperm(self.shape[0] * self.shape[1], generator=generator)[:count].clone()
        start = torch.zeros(count) if self.zero or not initialise else torch.randn(count)
        t["fourierft_spectrum"] = nn.Parameter(start.to(frozen.device, dtype))
        t["fourierft_places"] = Places(places.to(frozen.device))

    def update(self, t: Held, dtype: torch.dtype) -> Tensor:
        """Through at least fp32, in which the transform is made."""
        entries = t["fourierft_spectrum"]
        entries = entries.to(torch.promote_types(entries.dtype, torch.float32))
        spectrum = entries.new_zeros(self.shape[0] * self.shape[1]).index_put((t["fourierft_places"].places,), entries)
        return (torch.fft.ifft2(spectrum.view(self.shape)).real * self.fourierft_scaling).to(dtype)


class FourierFT(LayerMethod):
    """One FourierFT adapter in a host."""

    title = "FourierFT"
    families = LORA_TARGETS | {"gpt2": ["mlp.c_proj"], "gpt_bigcode": ["mlp.c_proj"]}

    def change(self, host: Site, path: str, frozen: Frozen) -> Change:
        config: FourierFTConfig = self.config  # type: ignore[assignment]
        count = pattern_value(config.n_frequency_pattern, path, config.n_frequency)
        return FourierChange(config, count, frozen, path)


register(PeftType.FOURIERFT, FourierFTConfig, FourierFT)
