"""VeRA: frozen random projections that all layers share, and trained vectors that scale them (arXiv:2310.11454, eq. 2).

``y = W x + b + l_b * B (l_d * A dropout(x))``: A [r, in], B [out, r] random and frozen, l_d [r], l_b [out]. l_b starts at
zero, so an untrained adapter changes nothing. Field names, defaults, maths and files are HF PEFT's; what differs from it:
* each adapter has projections of its own, so that adapters of different seeds, ranks and layers stand beside each other;
* several adapters of a layer read the same input, whatever their dtype;
* trained biases (`bias`) are LoRA's only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..architectures import LORA_TARGETS
from ..kernels import dropout
from ..layers import Change, Frozen, Held
from .base import PeftType, Site, register
from .fields import Count, Number, Probability, also_takes
from .projected import ProjectedChange, ProjectedConfig, ProjectedMethod


@also_takes({"peft_version": ...})
@dataclass(kw_only=True)
class VeraConfig(ProjectedConfig):
    """Configuration of VeRA.

    Args:
        r: rank of the projections; the vectors are short, so it is far higher than LoRA's.
        projection_prng_key: seed of the projections.
        save_projection: whether they are in the adapter's file; else they are made anew from the seed.
        vera_dropout: probability of dropping the update's input in training.
        d_initial: start value of l_d.
        fan_in_fan_out: accepted for HF PEFT's sake; the layout is read from the module.
        bias: must be "none".
        init_weights: l_b = 0, l_d = d_initial; False starts l_d at random and l_b at one.
        layers_to_transform, layers_pattern: only layers with these numbers (in a module list of that name).
    """

    r: Count = 256
    vera_dropout: Probability = 0.0
    d_initial: Number = 0.1

    neutral_fields: ClassVar[frozenset[str]] = ProjectedConfig.neutral_fields | {"vera_dropout", "d_initial"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.VERA


class VeraChange(ProjectedChange):
    """Of a linear layer."""

    tables: ClassVar[tuple[str, ...]] = ("vera_lambda_b", "vera_lambda_d", "vera_dropout")
    numbers = ("r",)
    dropout = "vera_dropout"

    def __init__(self, config: VeraConfig, pair: tuple, frozen: Frozen) -> None:
        super().__init__(pair, frozen, config.r, config.vera_dropout)
        self.start = config.d_initial if config.init_weights else None

    def create(self, t: Held, frozen: Frozen, dtype: torch.dtype, initialise: bool) -> None:
        b, d = (torch.ones(self.out), torch.randn(self.r)) if self.start is None else (
            torch.zeros(self.out), torch.full((self.r,), float(self.start)))  # fmt: skip
        self.fill(t, "vera_lambda_b", b, frozen, dtype)
        self.fill(t, "vera_lambda_d", d, frozen, dtype)
        self.add_dropout(t)

    def factors(self, t: Held) -> tuple[Tensor, Tensor]:
        a, b = self.shared(t)
        return t["vera_lambda_d"][:, None] * a[:, : self.size], t["vera_lambda_b"][:, None] * b[: self.out]

    def leave(self, t: Held, x: Tensor, y: Tensor, bias: Tensor | None, frozen: Frozen) -> Tensor:
        (a, b), d = self.shared(t), t["vera_lambda_d"]
        short = d * F.linear(dropout(x.to(d.dtype), self.dropped(t)), a[:, : self.size])
        return y + (t["vera_lambda_b"] * F.linear(short, b[: self.out])).to(y.dtype)


class Vera(ProjectedMethod):
    """One VeRA adapter in a host."""

    title = "VeRA"
    families = LORA_TARGETS | {"phi": ["q_proj", "v_proj"]}
    projections = ("vera_A", "vera_B")

    def project(self, out: int, size: int) -> tuple[Tensor, Tensor]:
        """A [r, in], B [out, r], uniform within sqrt(6 / columns) (Kaiming), as HF PEFT draws them."""
        config: VeraConfig = self.config  # type: ignore[assignment]
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        shapes = (config.r, size), (out, config.r)
        a, b = (torch.empty(s).uniform_(-math.sqrt(6 / s[1]), math.sqrt(6 / s[1]), generator=generator) for s in shapes)
        return a, b

    def change(self, host: Site, path: str, frozen: Frozen) -> Change:
        return VeraChange(self.config, self.pair(host), frozen)  # type: ignore[arg-type]


register(PeftType.VERA, VeraConfig, Vera)
