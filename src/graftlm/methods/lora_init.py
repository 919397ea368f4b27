"""Start values of LoRA beyond plain random ones: A0 [r, in] and B0 [out, r], from the base weight W [out, in].

* PiSSA (arXiv:2404.02948): the first r singular directions of W; `pissa_niter_<n>` by randomised SVD.
* OLoRA (arXiv:2406.01775): the first r columns and rows of W's QR factors.
* LoftQ (arXiv:2310.08659, algorithm 1 with one step): the best rank-r approximation of ``W - Q``, Q the quantised W, so that
  ``Q + B0 A0`` is close to W. Further steps of the paper would quantise ``W - B0 A0`` anew, that is change the base, which
  adapters share here.

* orthogonal (https://datta0.github.io/posts/rethink-lora-init/) needs no W: A0 and B0 are random in orthogonal halves of the
  r directions, so that ``B0 A0 = 0`` while neither is zero.

HF PEFT leaves the scale lora_alpha / r out of LoftQ's factors; here ``scale * B0 A0`` is the approximation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..quantization import round_to_levels


def from_weight(init: bool | str) -> bool:
    """Whether these start values are found again from the base weight whenever an adapter is attached."""
    return isinstance(init, str) and (init in ("pissa", "olora", "loftq") or init.startswith("pissa_niter_"))


def orthogonal_factors(out: int, size: int, r: int) -> tuple[Tensor, Tensor]:
    """A0 [r, size] and B0 [out, r] with ``B0 A0 = 0``.

    Raises:
        ConfigError: an odd rank, which has no halves.
    """
    if r % 2:
        raise ConfigError(f"init_lora_weights='orthogonal' needs an even rank, got r={r} (see rank_pattern, too).")
    basis = torch.linalg.qr(torch.randn(r, r))[0]
    a = torch.randn(size, r // 2) @ basis[0::2]
    b = torch.randn(r // 2, out).T @ basis[1::2]
    return a.T / 10, b / 10


def start_factors(config: Any, weight: Tensor, original: Tensor | None, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """A0 and B0 for `config.init_lora_weights`.

    Args:
        weight: the base weight [out, in], fp32, dequantised where it is quantised.
        original: for LoftQ on a quantised base, the weight that it was quantised from.
    """
    init = config.init_lora_weights
    if init == "olora":
        q, upper = torch.linalg.qr(weight)
        return upper[:r], q[:, :r]
    if init == "loftq":
        if original is None:
            scheme = "int8" if config.loftq_config.get("loftq_bits", 4) == 8 else "nf4"
            original, weight = weight, round_to_levels(weight, scheme)
        return low_rank(original.float() - weight, r, scale)
    if init == "pissa":
        return low_rank(weight, r, scale)
    with torch.random.fork_rng(devices=[]):  # randomised; a fixed seed makes loading find the same factors again
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(weight, q=r, niter=int(init.rpartition("_")[2]))
    root = (s / scale).sqrt()
    return root[:, None] * v.T, u * root


def low_rank(matrix: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] with ``scale * BA`` the best approximation of rank r of a matrix [out, in]."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = (s[:r] / scale).sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root
