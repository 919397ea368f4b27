"""LoKr: an update that is the Kronecker product of a small matrix and a larger one (LyCORIS, arXiv:2309.14859, section 3.1).

``y = W x + b + scale * (C kron D) x``, C [a, m], D [k, n], a k = out, m n = in, scale = alpha / r; D = D1 D2 of rank r
where r is less than half its longer side, and C likewise with `decompose_both`. C starts at zero, so an untrained adapter
changes nothing. The product is never made: x [m, n] goes through D, then through C. Field names, defaults, maths and
files are HF PEFT's; it takes linear layers and convolutions (the kernel goes with D: [k, n * kernel]), and what HF PEFT
lacks, GPT-2's Conv1D, Conv3d and 4-bit layers.
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

#: the tables of its tensors, in the order that HF PEFT draws them in
FACTORS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


@also_takes({"peft_version": ...})
@dataclass(kw_only=True)
class LoKrConfig(LayerConfig):
    """Configuration of LoKr.

    Args:
        r: rank of the larger factor (and with `decompose_both` of the smaller).
        alpha: numerator of the scale.
        rank_dropout: probability of dropping a row of the update in training.
        module_dropout: probability of leaving a layer's update out in training.
        use_effective_conv2d: decompose kernels of Conv1d and Conv2d that are larger than one by their axes.
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
        if isinstance(self.init_weights, str) and self.init_weights != "lycoris":
            raise ConfigError(f"init_weights={self.init_weights!r}: expected True, False or 'lycoris'.")
        if self.decompose_factor == 0 or self.decompose_factor < -1:
            raise ConfigError(f"decompose_factor={self.decompose_factor!r}: expected a whole number above 0, or -1.")


class LoKrChange(Change):
    """Of a linear layer or a convolution, whose kernel goes with D: [k, n, *kernel].

    Args:
        config: a `LoKrConfig`.
        r, alpha: of this layer.
    """

    tables: ClassVar[tuple[str, ...]] = (*FACTORS, "rank_dropout", "module_dropout")
    numbers = ("r", "alpha", "scaling")

    def __init__(self, config: LoKrConfig, r: int, alpha: float) -> None:
        self.r = r
        self.alpha = alpha
        self.scaling = alpha / r
        self.config = config

    def create(self, t: Held, frozen: Frozen, dtype: torch.dtype, initialise: bool) -> None:
        for table, shape in self.shapes(frozen).items():
            t[table] = nn.Parameter(torch.zeros(shape, dtype=dtype, device=frozen.device))
        start = self.config.init_weights
        zero = {True: ("lokr_w1", "lokr_w1_a"), "lycoris": ("lokr_w2", "lokr_w2_b"), False: ()}[start]  # type: ignore[index]
        for table in FACTORS:  # HF PEFT draws in this order
            if table in t and table not in zero and initialise:
                nn.init.kaiming_uniform_(t[table], a=math.sqrt(5))
        for table in ("rank_dropout", "module_dropout"):
            if (rate := getattr(self.config, table)) > 0:
                t[table] = nn.Dropout(rate)

    def shapes(self, frozen: Frozen) -> dict[str, tuple[int, ...]]:
        """Of the tensors, by table: each factor whole, or as a product of rank r."""
        kernel = getattr(frozen.layer, "kernel_size", ())
        (out, size), places = frozen.shape, math.prod(kernel)
        (a, k), (m, n) = (parts_of(width, self.config.decompose_factor) for width in (out, size // places))
        shapes: dict[str, tuple[int, ...]] = {"lokr_w1": (a, m)}
        if self.config.decompose_both and self.r < max(a, m) / 2:
            shapes = {"lokr_w1_a": (a, self.r), "lokr_w1_b": (self.r, m)}
        if self.r >= max(k, n) / 2:
            return shapes | {"lokr_w2": (k, n, *kernel)}
        if not self.config.use_effective_conv2d or places == 1:
            return shapes | {"lokr_w2_a": (k, self.r), "lokr_w2_b": (self.r, n * places)}
        if len(kernel) > 2:
            raise UnsupportedError("use_effective_conv2d=True is for Conv1d and Conv2d. Leave it out, or leave Conv3d out.")
        core = (self.r, self.r, *kernel, 1)[:4]
        return shapes | {"lokr_w2_a": (self.r, k), "lokr_w2_b": (self.r, n), "lokr_t2": core}

    def factors(self, t: Held, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """C [a, m] and D [k, n], or [k, n times the kernel's size]."""
        parts = {table: t[table].to(dtype) for table in FACTORS if table in t}
        c = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
        if "lokr_w2" in parts:
            return c, parts["lokr_w2"].flatten(1)
        if "lokr_t2" in parts:
            core, first, second = parts["lokr_t2"].flatten(2), parts["lokr_w2_a"], parts["lokr_w2_b"]
            return c, torch.einsum("ijk,ip,jq->pqk", core, first, second).flatten(1)
        return c, parts["lokr_w2_a"] @ parts["lokr_w2_b"]

    def update(self, t: Held, dtype: torch.dtype) -> Tensor:
        return torch.kron(*self.factors(t, dtype)) * self.scaling

    def rate(self, t: Held, table: str) -> float:
        """A probability of dropping, now."""
        return t[table].p if table in t and t[table].training else 0.0

    def leave(self, t: Held, x: Tensor, y: Tensor, bias: Tensor | None, frozen: Frozen) -> Tensor:
        if (p := self.rate(t, "module_dropout")) and not bool(torch.rand(1) > p):
            return y
        kept = None
        if p := self.rate(t, "rank_dropout"):
            kept = (torch.rand(frozen.shape[0]) > p).to(self.dtype(t)).to(frozen.device)
            kept = kept / kept.mean() if self.config.rank_dropout_scale else kept
        if frozen.kind == "conv":
            update = self.update(t, self.dtype(t))
            return y + frozen.product(x, update if kept is None else update * kept[:, None]).to(y.dtype)
        c, d = self.factors(t, self.dtype(t))
        inner = F.linear(x.to(d.dtype).unflatten(-1, (c.shape[1], d.shape[1])), d)  # [..., m, k]
        added = (c @ inner).flatten(-2) * self.scaling
        return y + (added if kept is None else added * kept).to(y.dtype)


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
    kinds = ("linear", "conv")
    takes = "linear layers (torch's, bitsandbytes', Conv1D) and convolutions"

    def change(self, host: Site, path: str, frozen: Frozen) -> Change:
        config: LoKrConfig = self.config  # type: ignore[assignment]
        r = pattern_value(config.rank_pattern, path, config.r)
        alpha = pattern_value(config.alpha_pattern, path, config.alpha)
        return LoKrChange(config, r, alpha)


register(PeftType.LOKR, LoKrConfig, LoKr)
