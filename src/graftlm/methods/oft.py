"""OFT: what a layer reads is rotated, block by block (arXiv:2306.07280; input-centric "v2", arXiv:2506.19847).

``y = W R^T x + b``, R block-diagonal with blocks made from skew-symmetric Q: ``(I - Q) (I + Q)^-1``, or cut-off Neumann
series of ``(I + Q) (I - Q)^-1`` without an inverse. Q is kept as what stands over its diagonal and starts at zero, so an
untrained adapter changes nothing. Field names, defaults, maths and files are HF PEFT's; what differs from it:

* `module_dropout` does what its text says (HF PEFT makes the layer and never calls it);
* several active adapters rotate as they are merged: ``W R1^T R2^T`` (HF PEFT merges this and computes ``W R2^T R1^T``);
* with `coft` evaluation leaves the trained values as they are and computes by the projected ones;
* GPT-2's Conv1D layers can be changed.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..layers import Change, Frozen, Held
from .base import PeftType, Site, register
from .biased import Biased, BiasedConfig
from .fields import Count, Positive, Probability, Whole, also_takes
from .orthogonal import by_blocks, cayley, neumann, some_left_out


@also_takes({"peft_version": ...})
@dataclass(kw_only=True)
class OFTConfig(BiasedConfig):
    """Configuration of OFT.

    Args:
        r: number of blocks; 0 where `oft_block_size` is given.
        oft_block_size: their size; 0 where `r` is given. One that does not divide a layer's input is replaced by the nearest
            that does, with a warning.
        module_dropout: share of the blocks that are left out in a training pass.
        fan_in_fan_out: accepted for HF PEFT's sake; the layout is read from the module.
        bias: "none", "all" or "oft_only": which biases are trained along.
        init_weights: Q = 0; False starts at random.
        layers_to_transform, layers_pattern: only layers with these numbers (in a module list of that name).
        coft: keep Q within a ball of radius `eps` / sqrt(blocks), by projecting it in each training pass.
        eps: that radius.
        block_share: one block for all pieces of the input.
        use_cayley_neumann: by the series; False by a solve, which is exactly orthogonal.
        num_cayley_neumann_terms: terms of the series.
    """

    r: Whole = 0
    oft_block_size: Whole = 32
    module_dropout: Probability = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool = True
    coft: bool = False
    eps: Positive = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: Count = 5

    own_biases: ClassVar[str] = "oft_only"
    neutral_fields: ClassVar[frozenset[str]] = frozenset({"module_dropout"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.OFT
        if (self.r > 0) == (self.oft_block_size > 0):
            raise ConfigError(
                f"r={self.r}, oft_block_size={self.oft_block_size}: give one of them, the other 0; their product is a "
                "layer's input."
            )


class Skew(nn.Module):
    """Skew-symmetric blocks by what stands over their diagonals: weight [D, b * (b - 1) / 2]."""

    upper: Tensor

    def __init__(self, blocks: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.zeros(blocks, size * (size - 1) // 2, dtype=dtype, device=device))
        self.register_buffer("upper", torch.triu_indices(size, size, 1, device=device), persistent=False)

    def blocks(self, weight: Tensor) -> Tensor:
        """[D, b, b]."""
        rows, columns = self.upper
        made = weight.new_zeros(len(weight), self.size, self.size)
        made[:, rows, columns] = weight
        return made - made.mT


class OFTChange(Change):
    """Of a linear layer: `oft_R` holds a `Skew`. It is given the layer's input width, or an embedding's output width."""

    tables: ClassVar[tuple[str, ...]] = ("oft_dropout", "oft_R")
    numbers = ("r", "oft_block_size")
    where: ClassVar[str] = "oft_R"

    def __init__(self, config: OFTConfig, width: int) -> None:
        self.config = config
        given = "r" if config.r else "oft_block_size"
        asked = config.r or config.oft_block_size
        taken = nearest_divisor(width, asked)
        if taken != asked:
            warnings.warn(
                f"{given}={asked} does not divide a width of {width}: {given}={taken} is taken there.", stacklevel=2
            )
        self.r, self.oft_block_size = (taken, width // taken) if config.r else (width // taken, taken)

    def create(self, t: Held, frozen: Frozen, dtype: torch.dtype, initialise: bool) -> None:
        t["oft_dropout"] = nn.Dropout(self.config.module_dropout) if self.config.module_dropout > 0 else nn.Identity()
        skew = Skew(1 if self.config.block_share else self.r, self.oft_block_size, dtype, frozen.device)
        if initialise and not self.config.init_weights:
            nn.init.normal_(skew.weight, std=0.1)
        t[self.where] = skew

    def rotation(self, t: Held) -> Tensor:
        """R as blocks [D, b, b], or [1, b, b] for all."""
        skew, config = t[self.where], self.config
        weight = skew.weight
        if config.coft:
            with torch.no_grad():
                near = projected(weight, config.eps)
            if skew.training and weight.requires_grad and torch.is_grad_enabled():
                with torch.no_grad():
                    weight.copy_(near)
            else:
                weight = weight + (near - weight).detach()
        blocks = skew.blocks(weight)
        made = neumann(blocks, config.num_cayley_neumann_terms) if config.use_cayley_neumann else cayley(blocks)
        return some_left_out(made, t["oft_dropout"]) if len(made) > 1 else made

    def enter(self, t: Held, x: Tensor) -> Tensor:
        return by_blocks(x, self.rotation(t))

    def leave(self, t: Held, x: Tensor, y: Tensor, bias: Tensor | None, frozen: Frozen) -> Tensor:
        return y

    def fold(self, t: Held, weight: Tensor, frozen: Frozen) -> Tensor:
        return by_blocks(weight, self.rotation(t).mT)


class EmbeddingChange(OFTChange):
    """Of an embedding: what it gives is rotated."""

    tables = ("oft_dropout", "oft_embedding_R")
    where = "oft_embedding_R"

    def enter(self, t: Held, x: Tensor) -> Tensor:
        return x

    @property
    def enters(self) -> bool:
        return False

    def leave(self, t: Held, x: Tensor, y: Tensor, bias: Tensor | None, frozen: Frozen) -> Tensor:
        return by_blocks(y, self.rotation(t))

    def fold(self, t: Held, weight: Tensor, frozen: Frozen) -> Tensor:
        return by_blocks(weight.T, self.rotation(t)).T


def nearest_divisor(width: int, asked: int) -> int:
    """The divisor of `width` that is nearest to `asked`; the lower one of two."""
    return min((d for d in range(1, width + 1) if width % d == 0), key=lambda d: (abs(d - asked), d))


def projected(weight: Tensor, eps: float) -> Tensor:
    """Blocks [D, n] whose skew-symmetric matrices have a Frobenius norm of at most ``eps / sqrt(D)``."""
    norm = torch.linalg.vector_norm(weight, dim=1, keepdim=True) * 2**0.5
    limit = eps / len(weight) ** 0.5
    return torch.where(norm <= limit, weight, weight * (limit / norm))


class OFT(Biased):
    """One OFT adapter in a host."""

    title = "OFT"
    kinds = ("linear", "embedding")
    takes = "linear layers (torch's, bitsandbytes', Conv1D) and embeddings"

    def change(self, host: Site, path: str, frozen: Frozen) -> Change:
        config: OFTConfig = self.config  # type: ignore[assignment]
        out, size = frozen.shape
        embedding = frozen.kind == "embedding"
        return (EmbeddingChange if embedding else OFTChange)(config, out if embedding else size)


register(PeftType.OFT, OFTConfig, OFT)
