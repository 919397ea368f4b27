"""MiSS: one small trained matrix that all shards of a weight share (arXiv:2409.15371, there also called DiSHA).

``y = W x + b + D^T s``, s [r] the sum of x's pieces of r numbers, D [r, out]: the update repeats D along the input. D starts
at zero, so an untrained adapter changes nothing. Two other forms (`init_weights`):

* "mini": D [r, mini_r] is repeated along the output, too;
* "bat": every block of r rows has its own D_o [r, r], and block W_on of the weight becomes ``W_on + W_on D_o + D_o``.

Field names, defaults, maths and files are HF PEFT's; what differs from it:
* each adapter of a layer has its own form (HF PEFT takes the first one's for all);
* `miss_dropout` drops what the update reads with "bat", too (HF PEFT passes it over);
* with "bat" an update is made from the base's own weight, whatever other adapters do to it;
* GPT-2's Conv1D layers can be changed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from ..kernels import dropout
from ..layers import Change, Frozen, Held
from .base import PeftType, Site, register
from .biased import Biased, BiasedConfig
from .fields import Count, Probability, also_takes


@also_takes({"peft_version": ...})
@dataclass(kw_only=True)
class MissConfig(BiasedConfig):
    """Configuration of MiSS.

    Args:
        r: length of a shard of the input, and rank of the update.
        miss_dropout: probability of dropping the update's input in training.
        mini_r: length of a shard of the output, for "mini".
        init_weights: True (D = 0), False (random), or another form, "bat" or "mini" (D = 0).
        bias: "none", "all" or "MiSS_only": which biases are trained along.
        layers_to_transform, layers_pattern: only layers with these numbers (in a module list of that name).
    """

    r: Count = 64
    miss_dropout: Probability = 0.0
    mini_r: Count = 1
    init_weights: bool | Literal["bat", "mini"] = True

    own_biases: ClassVar[str] = "MiSS_only"
    neutral_fields: ClassVar[frozenset[str]] = frozenset({"miss_dropout"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.MISS


class MissChange(Change):
    """Of a linear layer: `miss_block` [r, out], or with "mini" [r, mini_r]."""

    tables: ClassVar[tuple[str, ...]] = ("miss_dropout", "miss_block")
    numbers = ("miss_r", "miss_mini_r")

    def __init__(self, config: MissConfig, path: str, frozen: Frozen) -> None:
        self.miss_r, self.miss_mini_r, self.form = config.r, config.mini_r, config.init_weights
        self.rate = config.miss_dropout
        self.shape = out, size = frozen.shape
        if config.r > size:
            raise ConfigError(f"r={config.r} is over the input of {path!r}, {size}; take at most that, or leave it out.")
        if self.form == "mini" and out % config.mini_r:
            raise ConfigError(f"mini_r={config.mini_r} does not divide the output of {path!r}, {out}; take a divisor.")

    @property
    def size(self) -> tuple[int, ...]:
        return self.miss_r, self.miss_mini_r if self.form == "mini" else self.shape[0]

    def create(self, t: Held, frozen: Frozen, dtype: torch.dtype, initialise: bool) -> None:
        t["miss_dropout"] = nn.Dropout(self.rate) if self.rate > 0 else nn.Identity()
        t["miss_block"] = nn.Parameter(torch.zeros(self.size, dtype=dtype, device=frozen.device))
        if initialise and self.form is False:
            nn.init.kaiming_uniform_(t["miss_block"], a=math.sqrt(5))

    def dropped(self, t: Held, x: Tensor) -> Tensor:
        """What the update reads, in the adapter's dtype."""
        drop = t["miss_dropout"]
        return dropout(x, drop.p) if isinstance(drop, nn.Dropout) and drop.training else x

    def leave(self, t: Held, x: Tensor, y: Tensor, bias: Tensor | None, frozen: Frozen) -> Tensor:
        block = t["miss_block"]
        padded = F.pad(x.to(block.dtype), (0, -x.shape[-1] % self.miss_r))
        short = self.dropped(t, padded).unflatten(-1, (-1, self.miss_r)).sum(-2)
        added = short @ block
        if self.form == "mini":
            added = added.repeat(*[1] * (added.dim() - 1), self.shape[0] // self.miss_mini_r)
        return y + added.to(y.dtype)

    def update(self, t: Held, dtype: torch.dtype) -> Tensor:
        (out, size), block = self.shape, t["miss_block"].to(dtype).T
        return block.repeat(out // block.shape[0], -(-size // self.miss_r))[:, :size]


class BatChange(MissChange):
    """The "bat" form: `miss_block` [out / r, r, r]."""

    def __init__(self, config: MissConfig, path: str, frozen: Frozen) -> None:
        super().__init__(config, path, frozen)
        if any(width % config.r for width in frozen.shape):
            raise ConfigError(
                f"init_weights='bat' cuts weights into blocks of r={config.r}, which does not divide {path!r}, "
                f"{frozen.shape[0]} x {frozen.shape[1]}; take a divisor of both."
            )

    @property
    def size(self) -> tuple[int, ...]:
        return self.shape[0] // self.miss_r, self.miss_r, self.miss_r

    def delta(self, t: Held, frozen: Frozen, dtype: torch.dtype) -> Tensor:
        """The update [out, in]."""
        block = t["miss_block"].to(dtype)
        blocks = frozen.weight(dtype).unflatten(1, (-1, self.miss_r)).unflatten(0, (-1, self.miss_r))
        return (torch.einsum("oinj,ojk->oink", blocks, block) + block[:, :, None]).reshape(self.shape)

    def leave(self, t: Held, x: Tensor, y: Tensor, bias: Tensor | None, frozen: Frozen) -> Tensor:
        dtype = self.dtype(t)
        return y + frozen.product(self.dropped(t, x.to(dtype)), self.delta(t, frozen, dtype)).to(y.dtype)

    def fold(self, t: Held, weight: Tensor, frozen: Frozen) -> Tensor:
        return weight + self.delta(t, frozen, weight.dtype)


class Miss(Biased):
    """One MiSS adapter in a host."""

    title = "MiSS"

    def change(self, host: Site, path: str, frozen: Frozen) -> Change:
        config: MissConfig = self.config  # type: ignore[assignment]
        return (BatChange if config.init_weights == "bat" else MissChange)(config, path, frozen)


register(PeftType.MISS, MissConfig, Miss)
