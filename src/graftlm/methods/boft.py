"""BOFT: what a layer reads is rotated by a product of sparse butterfly factors, and each output is scaled
(arXiv:2311.06243).

``y = s * (W M^T x) + b``, M = M_n … M_1, each ``M_i = P_i R_i P_i^T`` with R_i block-diagonal (blocks
``(I - Q) (I + Q)^-1``, Q the skew-symmetric part of what is trained) and P_i a permutation that brings together halves of
blocks that are 2^i apart; s [out]. Q starts at zero and s at one, so an untrained adapter changes nothing. Field names,
defaults, maths and files are HF PEFT's; what differs from it:

* several factors need no CUDA extension (without it HF PEFT takes `boft_n_butterfly_factor` for 1, unlike its file says);
* x goes through the factors block by block, and no [in, in] matrix is made;
* unmerging gives the base back bit for bit; GPT-2's Conv1D layers can be changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..layers import Change, Frozen, Held
from .base import PeftType, Site, register
from .biased import Biased, BiasedConfig
from .fields import Count, Probability, Whole, also_takes
from .orthogonal import by_blocks, cayley, some_left_out


@also_takes({"peft_version": ...})
@dataclass(kw_only=True)
class BOFTConfig(BiasedConfig):
    """Configuration of BOFT.

    Args:
        boft_block_size: size of the blocks; 0 where `boft_block_num` is given.
        boft_block_num: their number; 0 where `boft_block_size` is given.
        boft_n_butterfly_factor: number of factors; 1 is a block-diagonal rotation, each further one doubles the reach.
        boft_dropout: share of the blocks of one factor, drawn at random, that are left out in a training pass.
        fan_in_fan_out: accepted for HF PEFT's sake; the layout is read from the module.
        bias: "none", "all" or "boft_only": which biases are trained along.
        init_weights: Q = 0 and s = 1; False starts at random.
        layers_to_transform, layers_pattern: only layers with these numbers (in a module list of that name).
    """

    boft_block_size: Whole = 4
    boft_block_num: Whole = 0
    boft_n_butterfly_factor: Count = 1
    boft_dropout: Probability = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool = True

    own_biases: ClassVar[str] = "boft_only"
    neutral_fields: ClassVar[frozenset[str]] = frozenset({"boft_dropout"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.BOFT
        if (self.boft_block_size > 0) == (self.boft_block_num > 0):
            raise ConfigError(
                f"boft_block_size={self.boft_block_size}, boft_block_num={self.boft_block_num}: give one of them, the other "
                "0; their product is a layer's input."
            )


class BOFTChange(Change):
    """Of a linear layer: `boft_R` [factors, D, b, b], `boft_s` [out, 1]."""

    tables: ClassVar[tuple[str, ...]] = ("boft_dropout", "boft_R", "boft_s")
    numbers = ("boft_block_size", "boft_block_num")

    def __init__(self, config: BOFTConfig, path: str, frozen: Frozen) -> None:
        self.config = config
        self.factors = config.boft_n_butterfly_factor
        size = frozen.shape[1]
        given = "boft_block_num" if config.boft_block_num else "boft_block_size"
        asked = getattr(config, given)
        if size % asked:
            raise ConfigError(f"{given}={asked} does not divide the input of {path!r}, {size}; take a divisor.")
        block, count = (size // asked, asked) if config.boft_block_num else (asked, size // asked)
        if self.factors > 1 and (block % 2 or count % 2 ** (self.factors - 1)):
            raise ConfigError(
                f"boft_n_butterfly_factor={self.factors} needs blocks of an even size whose number is a multiple of "
                f"{2 ** (self.factors - 1)}; {path!r}, with {size} inputs, has {count} of size {block}."
            )
        self.boft_block_size, self.boft_block_num = block, count

    def create(self, t: Held, frozen: Frozen, dtype: torch.dtype, initialise: bool) -> None:
        options = {"dtype": dtype, "device": frozen.device}
        b = self.boft_block_size
        t["boft_dropout"] = nn.Dropout(self.config.boft_dropout) if self.config.boft_dropout > 0 else nn.Identity()
        t["boft_R"] = nn.Parameter(torch.zeros(self.factors, self.boft_block_num, b, b, **options))  # type: ignore[call-overload]
        t["boft_s"] = nn.Parameter(torch.ones(frozen.shape[0], 1, **options))  # type: ignore[call-overload]
        if initialise and not self.config.init_weights:
            nn.init.normal_(t["boft_R"], std=0.1)
            nn.init.normal_(t["boft_s"], mean=1.0, std=0.1)

    def rotations(self, t: Held) -> list[Tensor]:
        """R_1, …, R_n as blocks [D, b, b]."""
        trained, drop = t["boft_R"], t["boft_dropout"]
        made = list(cayley((trained - trained.mT) / 2))
        if isinstance(drop, nn.Dropout) and drop.training:
            chosen = int(torch.randint(0, len(made), (1,)))
            made[chosen] = some_left_out(made[chosen], drop)
        return made

    def through(self, x: Tensor, factor: int, blocks: Tensor) -> Tensor:
        """``x P R P^T`` for x [..., in] in rows, P that of a factor."""
        if factor == 0:
            return by_blocks(x, blocks)
        half, pairs = self.boft_block_size // 2, 2**factor
        apart = x.unflatten(-1, (-1, 2, pairs, half)).transpose(-3, -2).flatten(-4)
        return by_blocks(apart, blocks).unflatten(-1, (-1, pairs, 2, half)).transpose(-3, -2).flatten(-4)

    def enter(self, t: Held, x: Tensor) -> Tensor:
        for factor, blocks in reversed(list(enumerate(self.rotations(t)))):
            x = self.through(x, factor, blocks)
        return x

    def leave(self, t: Held, x: Tensor, y: Tensor, bias: Tensor | None, frozen: Frozen) -> Tensor:
        scale = t["boft_s"].flatten()
        wide = y.to(torch.promote_types(y.dtype, scale.dtype))
        return (wide * scale if bias is None else (wide - bias) * scale + bias).to(y.dtype)

    def fold(self, t: Held, weight: Tensor, frozen: Frozen) -> Tensor:
        for factor, blocks in enumerate(self.rotations(t)):
            weight = self.through(weight, factor, blocks.mT)
        return weight * t["boft_s"]


class BOFT(Biased):
    """One BOFT adapter in a host."""

    title = "BOFT"

    def change(self, host: Site, path: str, frozen: Frozen) -> Change:
        return BOFTChange(self.config, path, frozen)  # type: ignore[arg-type]


register(PeftType.BOFT, BOFTConfig, BOFT)
