"""Exact, cheaper forms of what a training step computes. They know tensors only: no models, no adapters.

Each has its slow reference in `tests/core/test_kernels.py`.
"""

from . import varlen
from .allocator import keep_freed_memory, release_freed_memory, return_freed_memory
from .attention import Segments
from .dropout import dropout
from .gated import gated
from .linear import product
from .lora import Update, adapted_linear, grouped_low_rank, low_rank
from .loss import HeadForm, token_losses
from .norm import rms_norm

__all__ = [
    "HeadForm",
    "Segments",
    "Update",
    "adapted_linear",
    "dropout",
    "gated",
    "grouped_low_rank",
    "keep_freed_memory",
    "low_rank",
    "product",
    "release_freed_memory",
    "return_freed_memory",
    "rms_norm",
    "token_losses",
    "varlen",
]
