"""What OFT and BOFT share: square blocks of rotations, made from skew-symmetric ones by Cayley's transform.

Shapes: D blocks of size b; x [..., D * b].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def cayley(skew: Tensor) -> Tensor:
    """``(I - Q) (I + Q)^-1`` of skew-symmetric Q [..., b, b], which is orthogonal; in at least fp32."""
    skew = skew.to(torch.promote_types(skew.dtype, torch.float32))
    one = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(one + skew, one - skew, left=False)


def neumann(skew: Tensor, terms: int) -> Tensor:
    """``(I + Q) (I - Q)^-1`` where HF PEFT ends its series: ``I + 2Q + 2Q^2 + … + Q^n``, n = terms - 1 (3 for 3 terms)."""
    skew = skew.to(torch.promote_types(skew.dtype, torch.float32))
    made = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device).expand_as(skew)
    if terms > 1:
        made = made + 2 * skew
    if terms > 2:
        power = skew
        for _ in range(max(terms - 1, 3) - 2):
            power = power @ skew
            made = made + 2 * power
        made = made + power @ skew
    return made


def by_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """``x_d R_d`` for the pieces x_d of x [..., D * b] and blocks R [D, b, b], or [1, b, b] for all; in the blocks' or a
    wider dtype, as x's."""
    dtype = torch.promote_types(x.dtype, blocks.dtype)
    pieces = x.to(dtype).unflatten(-1, (-1, blocks.shape[-1]))
    blocks = blocks.to(dtype).expand(pieces.shape[-2], -1, -1)
    return torch.einsum("...dk,dkc->...dc", pieces, blocks).flatten(-2).to(x.dtype)


def some_left_out(blocks: Tensor, drop: nn.Module) -> Tensor:
    """In training a share of the blocks [D, b, b], drawn at random, is replaced by the identity."""
    if not (isinstance(drop, nn.Dropout) and drop.training):
        return blocks
    out = torch.randperm(len(blocks)) < int(drop.p * len(blocks))
    one = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    return torch.where(out.to(blocks.device)[:, None, None], one, blocks)
