"""LoRA's change of a convolution: y becomes ``y + scale * B(A(dropout(x)))``, two convolutions.

Shapes: x [N, in, *places]; A [r, in, *kernel], with the layer's stride, padding and dilation; B [out, r / groups, 1, …]. HF
PEFT's maths and shapes. Of one group that is the kernel ``W + scale * BA``, with A and B as matrices [r, in * kernel] and
[out, r]. Of several groups A reads all input channels, which the layer's own kernel cannot: nothing to merge then.

What differs from HF PEFT: a dilation and a way of padding other than zeros are the layer's own (HF PEFT's A has neither).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedError
from ..layers import Frozen, Held, LowRank
from .lora_change import LoraChange

# HF PEFT (0.21) adds the update of a MultiheadAttention's output projection to its weight twice, in passes and merged. Its
# files mean that, so here the scale of that update is doubled. (Its gradient there is of one of the two.)
OUT_PROJ = 2
CONVOLUTIONS: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}  # by the axes of the weight


class ConvChange(LoraChange):
    """Of a convolution. DoRA's magnitude is [1, out, 1, …], of the kernel's rows [out, in / groups * kernel]."""

    def make(self, t: Held, frozen: Frozen, dtype: torch.dtype) -> None:
        layer = frozen.layer
        self.groups = layer.groups
        if self.r % self.groups:
            raise ConfigError(
                f"r={self.r} on a {type(layer).__name__} of {self.groups} groups: expected a rank that they divide. Choose "
                "another one (for this layer by rank_pattern), or leave the layer out (exclude_modules)."
            )
        conv, one = CONVOLUTIONS[layer.weight.dim()], (1,) * len(layer.kernel_size)
        shape = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "padding_mode")}
        options: dict[str, Any] = {"device": frozen.device, "dtype": dtype}
        gives: Any = {"groups": self.groups, "bias": self.biased}
        t["lora_A"] = nn.utils.skip_init(conv, layer.in_channels, self.r, layer.kernel_size, **shape, bias=False, **options)
        t["lora_B"] = nn.utils.skip_init(conv, self.r, layer.out_channels, one, **gives, **options)

    def initialise(self, t: Held, frozen: Frozen, init: bool | str) -> None:
        if isinstance(init, str) and init != "gaussian":
            raise UnsupportedError(f"init_lora_weights={init!r} is for linear layers; leave convolutions out.")
        super().initialise(t, frozen, init)

    @property
    def additive(self) -> bool:
        return super().additive and self.groups == 1

    def low_rank(self, t: Held) -> LowRank | None:
        return None

    def update(self, t: Held, dtype: torch.dtype) -> Tensor:
        """``scale * BA`` [out, in / groups * kernel]. HF PEFT takes DoRA's norm by these rows whatever the groups are, and
        so must we for its files: it is what the trained magnitude stands against."""
        a, b = (factor.to(dtype) for factor in self.factors(t))
        made = b.reshape(-1, self.r) @ a.reshape(self.r, -1)
        return made.reshape(b.shape[0], -1) * self.scaling

    def norm(self, t: Held, frozen: Frozen, dtype: torch.dtype) -> Tensor:
        return frozen.along(super().norm(t, frozen, dtype))[None]

    def leave(self, t: Held, x: Tensor, y: Tensor, bias: Tensor | None, frozen: Frozen) -> Tensor:
        p = self.dropped(t)
        dropped = self.entering(x, self.dtype(t), p)
        added = t["lora_B"](t["lora_A"](dropped)) * self.scaling
        if self.dora:
            ratio = frozen.along(self.ratio(t, frozen, t["lora_magnitude_vector"].weight.dtype))
            if p:  # what enters the frozen weight is dropped, too
                plain = frozen.product(dropped, frozen.weight(dropped.dtype))
            else:
                plain = y if bias is None else y - frozen.along(bias)
            added = (ratio - 1) * plain + ratio * added
        return y + added.to(y.dtype)

    def check_merge(self, t: Held, frozen: Frozen) -> None:
        if self.groups > 1:
            raise UnsupportedError(
                f"A {type(frozen.layer).__name__} of {self.groups} groups cannot take LoRA's update into its weight: "
                "the update reads the channels of all groups. Keep the adapter attached, or leave such layers out of it."
            )

    def fold(self, t: Held, weight: Tensor, frozen: Frozen) -> Tensor:
        self.check_merge(t, frozen)
        weight = weight + self.update(t, weight.dtype)
        if not self.dora:
            return weight
        return self.ratio(t, frozen, weight.dtype).reshape(-1, 1) * weight


def check_dropout(config: Any, path: str) -> None:
    """A warning for dropout in torch's MultiheadAttention, which computes by its weights: there is no input to drop from."""
    if config.lora_dropout > 0:
        warnings.warn(
            f"lora_dropout={config.lora_dropout} has no effect in {path!r}: torch's MultiheadAttention computes by its "
            "weights, so the update's input is not dropped there (nor with HF PEFT).",
            stacklevel=2,
        )
