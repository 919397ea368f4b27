"""Embeddings by layer, looked up by token id beside the input embeddings (Gemma 3n, Gemma 4).

A model that is given embeddings has no ids to look them up by: Gemma 3n leaves them out silently, Gemma 4 raises. So a
pass with virtual tokens hands them in: the real tokens' own, and the padding token's for virtual ones, as these families do
for images and sound.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .walk import base_modules

NAME = "per_layer_inputs"


def per_layer_table(base: nn.Module) -> Any:
    """The module that looks them up; None for a base without, or one that does not take them."""
    parameters = inspect.signature(base.forward).parameters
    if NAME not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    found = (m for _, m in base_modules(base) if hasattr(m, "get_per_layer_inputs"))
    return next((m for m in found if getattr(m, "hidden_size_per_layer_input", None)), None)


def blank_ids(table: Any, *shape: int) -> Tensor:
    """The ids of tokens that are none."""
    pad = getattr(table.config, "pad_token_id", None) or 0
    return torch.full(shape, pad, dtype=torch.long, device=next(table.parameters()).device)


def per_layer_inputs(table: Any, ids: Tensor) -> dict[str, Tensor]:
    """The argument of a base's forward: ids [B, T] -> [B, T, layers, width]."""
    return {NAME: table.get_per_layer_inputs(ids, None) if _takes_two(table) else table.get_per_layer_inputs(ids)}


def _takes_two(table: Any) -> bool:
    return len(inspect.signature(table.get_per_layer_inputs).parameters) > 1
