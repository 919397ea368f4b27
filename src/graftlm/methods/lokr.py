"""LoKr: an update that is the Kronecker product of a small matrix and a larger one (LyCORIS, arXiv:2309.14859, section 3.1).

``y = W x + b + scale * (C kron D) x``, C [a, m], D [k, n], a k = out, m n = in, scale = alpha / r; D = D1 D2 of rank r
where r is less than half its longer side, and C likewise with `decompose_both`. C starts at zero, so an untrained adapter
changes nothing. The product is never made: x [m, n] goes through D, then through C. Field names, defaults, maths and
files are HF PEFT's; it takes linear layers, and what HF PEFT lacks, GPT-2's Conv1D and quantised layers. Convolutions are
not here yet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedError
from ..layers import Change, Frozen, Held
from .base import PeftType, Site, register
from .fields import Count, Number, Probability, also_takes
from .layered import LayerConfig, LayerMethod
from .targets import pattern_value


@also_takes({"peft_version": ...})
@dataclass(kw_only=True)
class LoKrConfig(LayerConfig):
    """Configuration of LoKr.

    Args:
        r: rank of the larger factor (and with `decompose_both` of the smaller).
        alpha: numerator of the scale.
        rank_dropout: probability of dropping a row of the update in training.
        module_dropout: probability of leaving a layer's update out in training.
        use_effective_conv2d: of convolutions, which are not here: must be False.
        decompose_both: give the smaller factor the rank r as well.
        decompose_factor: side of the smaller factor that is aimed at; -1: as near to the square root as divides.
        rank_dropout_scale: make up for the rows that are dropped.
        init_weights: C = 0; "lycoris": D = 0; False starts all at random.
        layers_to_transform, layers_pattern: only layers with these numbers (in a module list of that name).
        rank_pattern, alpha_pattern: other ranks and alphas for modules that match a name or regular expression.
    """

    r: Count = 8
    alpha: Number = 8
    rank_dropout: Probability = 0.0
    module_dropout: Probability = 0.0
    use_effective_conv2d: bool = False
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, Count] = field(default_factory=dict)
    alpha_pattern: dict[str, Number] = field(default_factory=dict)

    neutral_fields: ClassVar[frozenset[str]] = frozenset({"rank_dropout", "module_dropout", "rank_dropout_scale"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LOKR
        if self.use_effective_conv2d:
            raise UnsupportedError("use_effective_conv2d=True is for convolutions, which LoKr does not take. Leave it out.")
        if isinstance(self.init_weights, str) and self.init_weights != "lycoris":
            raise ConfigError(f"init_weights={self.init_weights!r}: expected True, False or 'lycoris'.")
        if self.decompose_factor == 0 or self.decompose_factor < -1:
            raise ConfigError(f"decompose_factor={self.decompose_factor!r}: expected a whole number above 0, or -1.")


class LoKrChange(Change):
    """Of a linear layer.

    Args:
        config: a `LoKrConfig`.
        r, alpha: of this layer.
    """

    tables: ClassVar[tuple[str, ...]] = (
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "rank_dropout", "module_dropout",
    )  # fmt: skip
    numbers = ("r", "alpha", "scaling")

    def __init__(self, config: LoKrConfig, r: int, alpha: float) -> None:
        self.r = r
        self.alpha = alpha
        self.scaling = alpha / r
        self.config = config

    def create(self, t: Held, frozen: Frozen, dtype: torch.dtype, initialise: bool) -> None:
        (a, k), (m, n) = (parts_of(width, self.config.decompose_factor) for width in frozen.shape)
        self.place(t, "lokr_w1", (a, m), self.config.decompose_both and self.r < max(a, m) / 2, frozen, dtype)
        self.place(t, "lokr_w2", (k, n), self.r < max(k, n) / 2, frozen, dtype)
        start = self.config.init_weights
        zero = {True: ("lokr_w1", "lokr_w1_a"), "lycoris": ("lokr_w2", "lokr_w2_b"), False: ()}[start]  # type: ignore[index]
        # HF PEFT draws in this order
        for table in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"):
            if table in t and table not in zero and initialise:
                nn.init.kaiming_uniform_(t[table], a=math.sqrt(5))
        for table in ("rank_dropout", "module_dropout"):
            if (rate := getattr(self.config, table)) > 0:
                t[table] = nn.Dropout(rate)

    def place(self, t: Held, table: str, shape: tuple[int, int], split: bool, frozen: Frozen, dtype: torch.dtype) -> None:
        """A factor whole, or as a product of rank r."""
        shapes = {f"{table}_a": (shape[0], self.r), f"{table}_b": (self.r, shape[1])} if split else {table: shape}
        for key, size in shapes.items():
            t[key] = nn.Parameter(torch.zeros(size, dtype=dtype, device=frozen.device))

    def factors(self, t: Held, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """C [a, m] and D [k, n]."""
        return tuple(
            t[table].to(dtype) if table in t else t[f"{table}_a"].to(dtype) @ t[f"{table}_b"].to(dtype)
            for table in ("lokr_w1", "lokr_w2")
        )  # type: ignore[return-value]

    def update(self, t: Held, dtype: torch.dtype) -> Tensor:
        return torch.kron(*self.factors(t, dtype)) * self.scaling

    def rate(self, t: Held, table: str) -> float:
        """A probability of dropping, now."""
        return t[table].p if table in t and t[table].training else 0.0

    def leave(self, t: Held, x: Tensor, y: Tensor, bias: Tensor | None, frozen: Frozen) -> Tensor:
        if (p := self.rate(t, "module_dropout")) and not bool(torch.rand(1) > p):
            return y
        c, d = self.factors(t, self.dtype(t))
        inner = F.linear(x.to(d.dtype).unflatten(-1, (c.shape[1], d.shape[1])), d)  # [..., m, k]
        added = (c @ inner).flatten(-2) * self.scaling
        if p := self.rate(t, "rank_dropout"):
            kept = (torch.rand(added.shape[-1]) > p).to(added)
            added = added * (kept / kept.mean() if self.config.rank_dropout_scale else kept)
        return y + added.to(y.dtype)


def parts_of(width: int, aim: int) -> tuple[int, int]:
    """Two numbers whose product is a width, the smaller one first: `aim` itself where it divides, else the divisor up to it
    that makes the smallest sum; without an aim (-1) the pair nearest to the square root."""
    if aim > 0 and width % aim == 0:
        return aim, width // aim
    small, large = 1, width
    for divisor in range(2, width if aim == -1 else aim + 1):
        if small >= large:
            break
        if width % divisor:
            continue
        if divisor + width // divisor > small + large:
            break
        small, large = divisor, width // divisor
    return min(small, large), max(small, large)


class LoKr(LayerMethod):
    """One LoKr adapter in a host."""

    title = "LoKr"

    def change(self, host: Site, path: str, frozen: Frozen) -> Change:
        config: LoKrConfig = self.config  # type: ignore[assignment]
        r = pattern_value(config.rank_pattern, path, config.r)
        alpha = pattern_value(config.alpha_pattern, path, config.alpha)
        return LoKrChange(config, r, alpha)


register(PeftType.LOKR, LoKrConfig, LoKr)
