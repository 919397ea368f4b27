"""RandLoRA: an update of full rank, a trained combination of frozen random products (arXiv:2502.00987, eq. 4).

``y = W x + b + scale * sum_j B_j L_j A G_j dropout(x)``, scale = randlora_alpha / r, over n = ceil(d / r) products for a
layer whose smaller width is d: A [r, d] and B_j [D, r] random and frozen, shared by all layers, L_j and G_j diagonal and
trained (`randlora_lambda` [r, n], `randlora_gamma` [n, d]). Where the output is the smaller width the order is turned
round. L starts at zero, so an untrained adapter changes nothing. Field names, defaults, maths and files are HF PEFT's,
whose B_j stand side by side in another order than the A's, which the random B makes good. What differs from it:
* each adapter has projections of its own, so that adapters of different seeds, ranks and layers stand beside each other;
* files hold the projections once, HF PEFT's once more for every layer (these are read as well);
* trained biases (`bias`) are LoRA's only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..layers import Change, Frozen, Held
from .base import PeftType, Site, register
from .fields import Count, Number, Probability, also_takes
from .projected import ProjectedChange, ProjectedConfig, ProjectedMethod


@also_takes({"peft_version": ...})
@dataclass(kw_only=True)
class RandLoraConfig(ProjectedConfig):
    """Configuration of RandLoRA.

    Args:
        r: rank of each random product; the fewer, the more products and trained numbers.
        projection_prng_key: seed of the projections.
        save_projection: whether they are in the adapter's file; else they are made anew from the seed.
        sparse: projections of -1, 0 and 1 (1/6, 2/3, 1/6), scaled to unit deviation.
        very_sparse: the same, -1 and 1 with 1 / (2 sqrt(d)) each.
        randlora_dropout: probability of dropping the update's input in training.
        randlora_alpha: numerator of the scale.
        fan_in_fan_out: accepted for HF PEFT's sake; the layout is read from the module.
        bias: must be "none".
        init_weights: lambda = 0; False starts it at random.
        layers_to_transform, layers_pattern: only layers with these numbers (in a module list of that name).
    """

    r: Count = 32
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: Probability = 0.0
    randlora_alpha: Number = 640

    neutral_fields: ClassVar[frozenset[str]] = ProjectedConfig.neutral_fields | {"randlora_dropout"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.RANDLORA


class RandLoraChange(ProjectedChange):
    """Of a linear layer."""

    tables: ClassVar[tuple[str, ...]] = ("randlora_lambda", "randlora_gamma", "randlora_dropout")
    numbers = ("r", "scaling")
    dropout = "randlora_dropout"

    def __init__(self, config: RandLoraConfig, pair: tuple, frozen: Frozen) -> None:
        super().__init__(pair, frozen, config.r, config.randlora_dropout)
        self.scaling = config.randlora_alpha / config.r
        self.low, self.high = sorted(frozen.shape)
        self.count = math.ceil(self.low / self.r)
        self.zero = config.init_weights

    def create(self, t: Held, frozen: Frozen, dtype: torch.dtype, initialise: bool) -> None:
        strengths = torch.zeros(self.r, self.count) if self.zero else torch.randn(self.r, self.count)
        gamma = torch.full((self.count, self.low), 1 / (max(self.count, self.low) if self.zero else self.high))
        self.fill(t, "randlora_lambda", strengths, frozen, dtype)
        self.fill(t, "randlora_gamma", gamma, frozen, dtype)
        self.add_dropout(t)

    def factors(self, t: Held) -> tuple[Tensor, Tensor]:
        a, b = self.shared(t)
        narrow = _Scaled.apply(a[:, 0, : self.low], t["randlora_lambda"], t["randlora_gamma"]).flatten(end_dim=1)
        wide = b[: self.high, : self.count].flatten(start_dim=1)
        return (narrow, wide) if self.low == self.size else (wide.T, narrow.T)


class _Scaled(torch.autograd.Function):
    """``L_kj A_kd G_jd`` [r, n, d]. Only the three are kept for the gradient, not products of a weight's size."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, strengths: Tensor, gamma: Tensor) -> Tensor:
        ctx.save_for_backward(a, strengths, gamma)
        return strengths[:, :, None] * a[:, None] * gamma

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        a, strengths, gamma = ctx.saved_tensors
        seen = gradient * a[:, None]
        return None, (seen * gamma).sum(2), torch.einsum("kjd,kj->jd", seen, strengths)


class RandLora(ProjectedMethod):
    """One RandLoRA adapter in a host."""

    title = "RandLoRA"
    projections = ("randlora_A", "randlora_B")

    def project(self, out: int, size: int) -> tuple[Tensor, Tensor]:
        """A [r, 1, d], B [D, n, r] of unit deviation, as HF PEFT draws them (dense ones in bfloat16)."""
        config: RandLoraConfig = self.config  # type: ignore[assignment]
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        (low, high), r = sorted((out, size)), config.r
        count = math.ceil(low / r)
        if config.sparse or config.very_sparse:
            share = 1 / (2 * (math.sqrt(low) if config.very_sparse else 3))
            a, b = (_signs(torch.rand(shape, generator=generator), share) for shape in ((r, 1, low), (high, count, r)))
        else:
            a = _uniform((r, 1, low), generator)
            b = torch.cat([_uniform((high, 1, r), generator) for _ in range(count)], dim=1)
        if not (a.any() and b.any()):
            raise ConfigError(f"very_sparse=True leaves only zeros in projections of {low} columns; use sparse=True.")
        return a / a.std(), b / b.std()

    def change(self, host: Site, path: str, frozen: Frozen) -> Change:
        return RandLoraChange(self.config, self.pair(host), frozen)  # type: ignore[arg-type]


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.bfloat16), a=math.sqrt(5), generator=generator)


def _signs(drawn: Tensor, share: float) -> Tensor:
    """-1 for the lowest share of numbers in [0, 1), 1 for the highest, 0 between."""
    return (drawn > 1 - share).float() - (drawn < share).float()


register(PeftType.RANDLORA, RandLoraConfig, RandLora)
