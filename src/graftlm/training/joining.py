"""Batches of one update, joined: gradient accumulation over short rows as one pass over all of them.

The loss of each batch is its sum over labels divided by the labels of the whole update, so that the gradient of the joined
batch is the sum of theirs, exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..joint import FILLERS, stacked

TOKENS = 1024  # a joined batch is not grown beyond so many: more brings no speed, and takes memory


class Joiner:
    """Collects batches until the update's last, or until they are `TOKENS` long."""

    def __init__(self, tokens: int = TOKENS) -> None:
        self.tokens = tokens
        self.waiting: list[dict[str, Tensor]] = []

    def add(self, inputs: dict[str, Any], last: bool) -> list[dict[str, Any]]:
        """The batches to train on now; none if `inputs` waits for the next ones. `last`: of this update."""
        if not joinable(inputs):
            return [*self.take(), inputs]
        self.waiting.append({"attention_mask": torch.ones_like(inputs["input_ids"])} | inputs)
        sizes = [int(b["attention_mask"].sum()) for b in self.waiting]
        full = sum(sizes) * (len(sizes) + 1) > self.tokens * len(sizes)  # one more of their mean size
        return self.take() if last or full else []

    def take(self) -> list[dict[str, Any]]:
        """What waits, as one batch; nothing if nothing does."""
        waiting, self.waiting = self.waiting, []
        return [stacked(waiting)] if waiting else []


def joinable(inputs: dict[str, Any]) -> bool:
    """Whether a batch has ids, labels and perhaps a mask, [B, T], and nothing else."""
    shapes = {v.shape for v in inputs.values() if isinstance(v, Tensor)}
    return {"input_ids", "labels"} <= inputs.keys() <= FILLERS.keys() and len(shapes) == 1 and len(next(iter(shapes))) == 2
