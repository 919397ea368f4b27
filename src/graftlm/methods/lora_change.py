"""LoRA's change of a layer: y becomes ``y + scale * B A dropout(x)``.

Shapes: x [..., in]; A [r, in]; B [out, r].

* LoRA, https://arxiv.org/abs/2106.09685 eq. 3; scale = lora_alpha / r, or lora_alpha / sqrt(r) (rsLoRA, arXiv:2312.03732).
* `lora_bias`: B has a bias c [out] of its own, ``y + scale * (B A dropout(x) + c)``.
* DoRA, https://arxiv.org/abs/2402.09353 eq. 5: ``W' = m * (W + scale*BA) / ||W + scale*BA||`` by rows of the output, the
  norm held constant in the gradient.
* PiSSA, OLoRA and LoftQ (see `lora_init`), CorDA and LoRA-GA (`lora_data_init`) start from factors that come from W, and
  train against the residual ``W - scale*B0*A0``. HF PEFT overwrites the base weight by that residual; here the base stays
  as it is, the start factors are kept beside the trained ones and subtracted, so that the base can be shared, switched back
  and wrapped twice.

Parameter names are HF PEFT's (`lora_A.<adapter>.weight`, `lora_embedding_A.<adapter>`, `lora_magnitude_vector…`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedError
from ..kernels import dropout
from ..layers import Change, Frozen, Held, LowRank
from .lora_data_config import KEPT
from .lora_data_init import data_factors
from .lora_init import from_weight, orthogonal_factors, start_factors


class Magnitude(nn.Module):
    """DoRA's trained length of every output row: weight [out]."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class Start(nn.Module):
    """The factors A0 [r, in] and B0 [out, r] that an adapter's product is taken against."""

    a: Tensor
    b: Tensor

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.register_buffer("a", a.detach().clone(), persistent=False)
        self.register_buffer("b", b.detach().clone(), persistent=False)


class LoraChange(Change):
    """Of a linear layer.

    Args:
        config: a `LoraConfig`.
        r, alpha: of this layer.
        original: for LoftQ on a quantised layer, gives the weight [out, in] that it was quantised from.
    """

    tables: ClassVar[tuple[str, ...]] = ("lora_dropout", "lora_A", "lora_B", "lora_magnitude_vector", "lora_start")
    bare = frozenset({"lora_magnitude_vector"})
    numbers: ClassVar[tuple[str, ...]] = ("r", "lora_alpha", "scaling")
    groups = 1  # of a convolution's channels

    def __init__(self, config: Any, r: int, alpha: float, original: Callable[[], Tensor] | None = None) -> None:
        self.r = r
        self.lora_alpha = alpha
        self.scaling: Any = self.initial_scaling(config)
        self.dora = config.use_dora
        self.biased = config.lora_bias
        self.started = False
        self.config = config
        self.original = original

    def initial_scaling(self, config: Any) -> float:
        """lora_alpha / r, or lora_alpha / sqrt(r)."""
        return self.lora_alpha / (math.sqrt(self.r) if config.use_rslora else self.r)

    def rescale(self, r: int, scaling: Any) -> None:
        """Another rank and scale; a scale that is a tensor (in a compiled model) stays one."""
        self.r, rslora = r, self.config.use_rslora
        self.lora_alpha = float(scaling) * (math.sqrt(r) if rslora else r)
        if isinstance(self.scaling, Tensor) and not isinstance(scaling, Tensor):
            self.scaling.fill_(scaling)
        else:
            self.scaling = scaling

    # -- tensors ---------------------------------------------------------------------------------------------------------
    def create(self, t: Held, frozen: Frozen, dtype: torch.dtype, initialise: bool) -> None:
        config, init = self.config, self.config.init_lora_weights
        t["lora_dropout"] = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        self.make(t, frozen, dtype)
        if init in KEPT:
            t["lora_start"] = Start(*(torch.zeros_like(factor) for factor in self.factors(t)))
            self.started = True
        if initialise or (from_weight(init) and not (init == "loftq" and frozen.quantized)):
            with torch.no_grad():
                self.initialise(t, frozen, init)
        if self.dora:
            t["lora_magnitude_vector"] = Magnitude(self.norm(t, frozen, torch.float32).to(dtype))
        self.original = None

    def make(self, t: Held, frozen: Frozen, dtype: torch.dtype) -> None:
        """The factors, without values."""
        (out, size), options = frozen.shape, {"device": frozen.device, "dtype": dtype}
        t["lora_A"] = nn.utils.skip_init(nn.Linear, size, self.r, bias=False, **options)  # type: ignore[arg-type]
        t["lora_B"] = nn.utils.skip_init(nn.Linear, self.r, out, bias=self.biased, **options)  # type: ignore[arg-type]

    def initialise(self, t: Held, frozen: Frozen, init: bool | str) -> None:
        a, b = self.factors(t)
        if init == "gaussian":
            nn.init.normal_(a, std=1 / self.r)
            nn.init.zeros_(b)
        elif init == "orthogonal":
            start_a, start_b = orthogonal_factors(b.shape[0], a.shape[1], self.r)
            a.copy_(start_a)
            b.copy_(start_b)
        elif init in KEPT:
            for start, factor, value in zip(t["lora_start"].buffers(), (a, b), self.data(frozen), strict=True):
                factor.copy_(value)
                start.copy_(factor)
        elif isinstance(init, str) and init != "eva":
            original = None if self.original is None else self.original()
            start_a, start_b = start_factors(self.config, frozen.weight(torch.float32), original, self.r, self.scaling)
            a.copy_(start_a)
            b.copy_(start_b)
            if original is None:  # a LoftQ adapter of a quantised base makes up for its rounding: nothing to subtract
                t["lora_start"] = Start(a, b)
                self.started = True
        else:  # True as in the paper's code; False (for tests) keeps both random
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            nn.init.zeros_(b) if init else nn.init.kaiming_uniform_(b, a=math.sqrt(5))
            if self.biased:
                limit = 0.0 if init else 1 / math.sqrt(self.r)  # as torch starts a linear layer
                nn.init.uniform_(t["lora_B"].bias, -limit, limit)

    def data(self, frozen: Frozen) -> tuple[Tensor, Tensor]:
        """Start values that were found by passes over data."""
        return data_factors(self.config, frozen, self.r, self.scaling)

    def factors(self, t: Held) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r]."""
        return t["lora_A"].weight, t["lora_B"].weight

    # -- what it computes ------------------------------------------------------------------------------------------------
    @property
    def additive(self) -> bool:
        return not self.dora

    def dropped(self, t: Held) -> float:
        """The probability at which the input is dropped now."""
        drop = t["lora_dropout"]
        return drop.p if drop.training and isinstance(drop, nn.Dropout) else 0.0

    def low_rank(self, t: Held) -> LowRank | None:
        if self.dora or self.started or self.biased or isinstance(self.scaling, Tensor):
            return None
        return LowRank(*self.factors(t), self.scaling, self.dropped(t))

    def update(self, t: Held, dtype: torch.dtype) -> Tensor:
        """``scale * (BA - B0A0)`` [out, in]."""
        a, b = self.factors(t)
        delta = b.to(dtype) @ a.to(dtype)
        if self.started:
            start = t["lora_start"]
            delta = delta - start.b.to(dtype) @ start.a.to(dtype)
        return delta * self.scaling

    def norm(self, t: Held, frozen: Frozen, dtype: torch.dtype) -> Tensor:
        """Length of every row of ``W + update``: [out]; no gradient."""
        with torch.no_grad():
            return torch.linalg.vector_norm(frozen.weight(dtype) + self.update(t, dtype), dim=1)

    def ratio(self, t: Held, frozen: Frozen, dtype: torch.dtype) -> Tensor:
        """What every row is multiplied by, magnitude over length: 1 for a row of zeros, which has no direction."""
        length = self.norm(t, frozen, dtype)
        return torch.where(length > 0, t["lora_magnitude_vector"].weight.to(dtype) / length.where(length > 0, 1.0), 1.0)

    def leave(self, t: Held, x: Tensor, y: Tensor, bias: Tensor | None, frozen: Frozen) -> Tensor:
        (a, b), p, scale = self.factors(t), self.dropped(t), frozen.scale
        dropped = self.entering(x, a.dtype, p)
        added = self.product(dropped, a, b) * self.scaling
        if self.biased:
            added = added + self.own_bias(t)
        if self.started:
            start = t["lora_start"]
            added = added - self.product(self.entering(x, start.a.dtype, 0.0), start.a, start.b) * self.scaling
        added = added if scale is None else added * scale
        if self.dora:
            ratio = self.ratio(t, frozen, t["lora_magnitude_vector"].weight.dtype)
            if p:  # what enters the frozen weight is dropped, too
                plain = F.linear(dropped, frozen.weight(dropped.dtype))
            else:
                plain = y if bias is None else y - bias
            added = (ratio - 1) * plain + ratio * added
        return y + added.to(y.dtype)

    def fold(self, t: Held, weight: Tensor, frozen: Frozen) -> Tensor:
        weight = super().fold(t, weight, frozen)
        if not self.dora:
            return weight
        return self.ratio(t, frozen, weight.dtype)[:, None] * weight

    def own_bias(self, t: Held) -> Tensor:
        """``scale * c`` [out], of `lora_bias`."""
        return t["lora_B"].bias * self.scaling

    def bias(self, t: Held, bias: Tensor | None) -> Tensor | None:
        if not self.biased:
            return bias
        own = self.own_bias(t)
        return own if bias is None else bias + own.to(bias.dtype)

    @staticmethod
    def entering(x: Tensor, dtype: torch.dtype, p: float) -> Tensor:
        """What the factors read."""
        return dropout(x.to(dtype), p)

    @staticmethod
    def product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """``x A^T B^T`` [..., out]."""
        return F.linear(F.linear(x, a), b)


class EmbeddingChange(LoraChange):
    """Of an embedding: A [r, vocabulary], B [hidden, r]; token t's update is ``scale * B A[:, t]``. Nothing is dropped."""

    tables = ("lora_dropout", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")

    def make(self, t: Held, frozen: Frozen, dtype: torch.dtype) -> None:
        if self.config.alora_invocation_tokens:
            raise ConfigError("alora_invocation_tokens is for linear layers; leave embeddings out of target_modules.")
        if self.biased:
            raise ConfigError("lora_bias=True is not supported for Embedding; leave embeddings out of target_modules.")
        out, size = frozen.shape
        t["lora_embedding_A"] = nn.Parameter(torch.zeros(self.r, size, dtype=dtype, device=frozen.device))
        t["lora_embedding_B"] = nn.Parameter(torch.zeros(out, self.r, dtype=dtype, device=frozen.device))

    def initialise(self, t: Held, frozen: Frozen, init: bool | str) -> None:
        if isinstance(init, str) and init != "gaussian":
            raise UnsupportedError(f"init_lora_weights={init!r} is for linear layers; leave embeddings out.")
        a, b = self.factors(t)
        nn.init.normal_(b)
        nn.init.zeros_(a) if init else nn.init.normal_(a)

    def factors(self, t: Held) -> tuple[Tensor, Tensor]:
        return t["lora_embedding_A"], t["lora_embedding_B"]

    def dropped(self, t: Held) -> float:
        return 0.0

    def drops(self, t: Held) -> bool:
        return False

    def low_rank(self, t: Held) -> LowRank | None:
        return None

    @staticmethod
    def entering(x: Tensor, dtype: torch.dtype, p: float) -> Tensor:
        return x

    @staticmethod
    def product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.embedding(x, a.T) @ b.T
