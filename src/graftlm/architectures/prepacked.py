"""Frozen linear layers that multiply by weights kept as the processor multiplies by them fastest (see `kernels.packed`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakSet

import psutil
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..kernels.blocks import DTYPES, fits_halves
from ..kernels.linear import onednn_multiplies
from ..kernels.packed import is_kept, packed_weights
from .fast import LINEAR, Fast, fast_class
from .gated import plain
from .walk import base_modules, innermost

_OURS: Any = WeakSet()  # modules that have their fast form for this


@contextmanager
def prepacked(model: nn.Module, at_most: int | None = None) -> Iterator[int]:
    """Within the block, keep a model's frozen linear weights on a CPU a second time, in the form that it multiplies by
    fastest (and a third time where it is trained): in oneDNN's layout, or in 16 bits where these lose nothing; yields the
    bytes of one such copy in the weights' own dtype, which is the most that it takes.

    It helps most where few rows meet large weights: generation, short batches, bf16. Results differ by rounding. Within the
    block nobody may write into these weights by `weight.data`; everything else that changes them is noticed.

    Args:
        model: a `PeftModel` or its base.
        at_most: bytes of one copy, above which nothing is kept (0 is yielded); what other blocks keep already costs nothing.
    """
    base: Any = innermost(model)
    layers: list[Any] = [m for _, m in base_modules(base) if plain(type(m)) in LINEAR and packable(m)]
    size = sum(m.weight.nbytes for m in layers)
    if at_most is not None and sum(m.weight.nbytes for m in layers if not is_kept(m.weight)) > at_most:
        layers, size = [], 0
    for module in layers:
        if not isinstance(module, Fast):
            kind: Any = type(module)
            module.__class__ = fast_class(kind, LINEAR[kind])
            _OURS.add(module)
    try:
        with packed_weights([(m.weight, plain(type(m)) is Conv1D) for m in layers]):
            yield size
    finally:
        for module in layers:
            if module in _OURS and not is_kept(module.weight):  # no other block is open
                _OURS.discard(module)
                module.__class__ = plain(type(module))


def prepacked_if_free(model: nn.Module, copies: int) -> AbstractContextManager[int]:
    """`prepacked` where so many copies (one, or two in training) take less than half of the free memory."""
    return prepacked(model, at_most=psutil.virtual_memory().available // (2 * copies))


def packable(module: Any) -> bool:
    """Whether a linear layer's weight is frozen and has a form that is faster than as it lies."""
    weight = module.weight
    return (
        type(weight) in (torch.Tensor, nn.Parameter)  # no quantised tensor
        and not weight.is_inference()  # those tell of no changes
        and weight.device.type == "cpu"
        and weight.dtype in DTYPES
        and not any(p.requires_grad for p in module.parameters(recurse=False))
        and (onednn_multiplies(weight.dtype) or fits_halves(weight))
    )
