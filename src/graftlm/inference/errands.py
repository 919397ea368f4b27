"""What is asked of a server's model beside completions: the engine's thread does it between two steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from ..architectures import is_encoder_decoder
from .registry import Version

EMBEDDED = 2048  # tokens, padding included, that are embedded between two steps; one text may be longer


@dataclass(eq=False, kw_only=True)
class Errand:
    """Something to be done with adapters attached.

    Args:
        versions: these.
        what: does it, given their names in the model.
        deadline: when nobody wants it any more, by the engine's clock.
    """

    versions: tuple[Version, ...]
    what: Callable[[tuple[str, ...]], Any]
    deadline: float | None = None
    done: Future = field(default_factory=Future)


@torch.no_grad()
def embedded(model: Any, group: tuple[str, ...], rows: Sequence[Sequence[int]], pooling: str, size: int = 8) -> list:
    """One vector a row: the mean of the last hidden states of its tokens, or the last token's, under some adapters; of an
    encoder-decoder model its encoder's.

    Args:
        rows: token ids.
        pooling: "mean" or "last".
    """
    vectors: list[list[float]] = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        longest = max(map(len, part))
        ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in part])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in part])
        names: list = [list(group) if group else "__base__"] * len(part)
        options: dict[str, Any] = {"use_cache": False}
        if encodes := is_encoder_decoder(model.base):
            options["decoder_input_ids"] = ids[:, :1]  # of which nothing is kept
        elif "logits_to_keep" in inspect.signature(model.base.forward).parameters:
            options["logits_to_keep"] = 1  # nobody reads logits, and a vocabulary a token would fill the memory
        out = model(input_ids=ids, attention_mask=mask, adapter_names=names, output_hidden_states=True, **options)
        hidden = (out.encoder_last_hidden_state if encodes else out.hidden_states[-1])[:, -longest:].float()
        kept = mask[..., None].to(hidden.device)
        pooled = hidden[:, -1] if pooling == "last" else (hidden * kept).sum(1) / kept.sum(1)
        vectors += pooled.cpu().tolist()
    return vectors


def at_once(rows: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    """The first of some rows, as many as fit into `EMBEDDED` tokens beside each other; one at least."""
    longest = 0
    for i, row in enumerate(rows):
        longest = max(longest, len(row))
        if i and longest * (i + 1) > EMBEDDED:
            return rows[:i]
    return rows
