"""First derivatives only: what these functions keep is not enough for second ones, which would be wrong without a word."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def first_order(backward: Callable) -> Callable:
    """Let a backward pass raise where a graph of it is asked for (`create_graph=True`)."""

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "GraftLM's training functions have first derivatives only (create_graph=True was asked for). For gradient "
                "penalties and the like take the model out of training mode (model.eval()): its passes are then plain ones."
            )
        return backward(ctx, *gradients)

    return checked
