"""LoHa: an update that is the elementwise product of two low-rank ones (FedPara, arXiv:2108.06098; LyCORIS).

``y = W x + b + scale * ((A1 B1) * (A2 B2)) x``, A1, A2 [out, r], B1, B2 [r, in], scale = alpha / r: of rank up to r squared.
B2 starts at zero, so an untrained adapter changes nothing. Of a convolution `in` is the input channels of a group times the
kernel's size; with `use_effective_conv2d` each product is a Tucker decomposition of the kernel instead, ``T [r, r, kernel]``
with A [r, out] and B [r, in channels] (FedPara, proposition 3). Field names, defaults, maths and files are HF PEFT's; what
it lacks are GPT-2's Conv1D, 4-bit layers and Conv3d.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..layers import Change, Frozen, Held
from .base import PeftType, Site, register
from .fields import Count, Number, Probability, also_takes
from .layered import LayerConfig, LayerMethod
from .targets import pattern_value

FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
CORES = ("hada_t1", "hada_t2")


@also_takes({"peft_version": ...})
@dataclass(kw_only=True)
class LoHaConfig(LayerConfig):
    """Configuration of LoHa.

    Args:
        r: rank of each of the two products.
        alpha: numerator of the scale.
        rank_dropout: probability of dropping a row of the update in training.
        module_dropout: probability of leaving a layer's update out in training.
        use_effective_conv2d: decompose kernels of Conv1d and Conv2d (larger than one) by their axes.
        init_weights: B2 = 0; False starts all at random.
        layers_to_transform, layers_pattern: only layers with these numbers (in a module list of that name).
        rank_pattern, alpha_pattern: other ranks and alphas for modules that match a name or regular expression.
    """

    r: Count = 8
    alpha: Number = 8
    rank_dropout: Probability = 0.0
    module_dropout: Probability = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, Count] = field(default_factory=dict)
    alpha_pattern: dict[str, Number] = field(default_factory=dict)

    neutral_fields: ClassVar[frozenset[str]] = frozenset({"rank_dropout", "module_dropout"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LOHA


class LoHaChange(Change):
    """Of a linear layer or a convolution.

    Args:
        config: a `LoHaConfig`.
        r, alpha: of this layer.
    """

    tables: ClassVar[tuple[str, ...]] = (*FACTORS, *CORES, "rank_dropout", "module_dropout")
    numbers = ("r", "alpha", "scaling")

    def __init__(self, config: LoHaConfig, r: int, alpha: float) -> None:
        self.r = r
        self.alpha = alpha
        self.scaling = alpha / r
        self.rates = {"rank_dropout": config.rank_dropout, "module_dropout": config.module_dropout}
        self.zero = config.init_weights
        self.effective = config.use_effective_conv2d

    def create(self, t: Held, frozen: Frozen, dtype: torch.dtype, initialise: bool) -> None:
        for table, shape in self.shapes(frozen).items():
            t[table] = nn.Parameter(torch.zeros(shape, dtype=dtype, device=frozen.device))
            if initialise and not (self.zero and table == "hada_w2_b"):
                nn.init.kaiming_uniform_(t[table], a=math.sqrt(5))
        for table, rate in self.rates.items():
            if rate > 0:
                t[table] = nn.Dropout(rate)

    def shapes(self, frozen: Frozen) -> dict[str, tuple[int, ...]]:
        """Of the tensors, by table."""
        (out, size), kernel = frozen.shape, getattr(frozen.layer, "kernel_size", ())
        if not self.effective or frozen.kind != "conv" or math.prod(kernel) == 1:
            return {table: (out, self.r) if table.endswith("a") else (self.r, size) for table in FACTORS}
        if len(kernel) > 2:
            raise UnsupportedError("use_effective_conv2d=True is for Conv1d and Conv2d. Leave it out, or leave Conv3d out.")
        channels = size // math.prod(kernel)
        core = (self.r, self.r, *kernel, 1)[:4]
        return {t: (self.r, out if t.endswith("a") else channels) for t in FACTORS} | dict.fromkeys(CORES, core)

    def update(self, t: Held, dtype: torch.dtype) -> Tensor:
        if CORES[0] in t:
            a1, b1, a2, b2, t1, t2 = (t[table].to(dtype) for table in (*FACTORS, *CORES))
            first, second = (torch.einsum("ijk,ip,jq->pqk", c.flatten(2), a, b) for c, a, b in ((t1, a1, b1), (t2, a2, b2)))
            return (first * second).flatten(1) * self.scaling
        return _Hadamard.apply(*(t[table].to(dtype) for table in FACTORS)) * self.scaling

    def rate(self, t: Held, table: str) -> float:
        """A probability of dropping, now."""
        return t[table].p if table in t and t[table].training else 0.0

    def leave(self, t: Held, x: Tensor, y: Tensor, bias: Tensor | None, frozen: Frozen) -> Tensor:
        if (p := self.rate(t, "module_dropout")) and not bool(torch.rand(1) > p):
            return y
        update = self.update(t, self.dtype(t))
        if p := self.rate(t, "rank_dropout"):
            kept = (torch.rand(len(update)) > p).to(update)
            update = update * (kept / kept.mean())[:, None]
        return y + frozen.product(x, update).to(y.dtype)


class _Hadamard(torch.autograd.Function):
    """``(A1 B1) * (A2 B2)``. Only the factors are kept for the gradient, not the products of a weight's size."""

    @staticmethod
    def forward(ctx: Any, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        ctx.save_for_backward(a1, b1, a2, b2)
        return (a1 @ b1) * (a2 @ b2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        a1, b1, a2, b2 = ctx.saved_tensors
        to_first, to_second = gradient * (a2 @ b2), gradient * (a1 @ b1)
        return to_first @ b1.T, a1.T @ to_first, to_second @ b2.T, a2.T @ to_second


class LoHa(LayerMethod):
    """One LoHa adapter in a host."""

    title = "LoHa"
    kinds = ("linear", "conv")
    ranked = True
    takes = "linear layers (torch's, bitsandbytes', Conv1D) and convolutions"

    def change(self, host: Site, path: str, frozen: Frozen) -> Change:
        config: LoHaConfig = self.config  # type: ignore[assignment]
        r = pattern_value(config.rank_pattern, path, config.r)
        alpha = pattern_value(config.alpha_pattern, path, config.alpha)
        return LoHaChange(config, r, alpha)


register(PeftType.LOHA, LoHaConfig, LoHa)
