"""A prefix in front of every layer's keys and values: in a cache that is kept, or only while a pass runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from .state import Memory


class PrefixLayer(DynamicLayer):
    """One layer's prefix [kv_heads, K, head_dim]: `update` puts it in front and keeps nothing, so that a layer can be
    run twice (activation checkpointing) with the same result."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.prefix = (keys, values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = (t.to(key_states.dtype).expand(key_states.shape[0], -1, -1, -1) for t in self.prefix)
        return torch.cat((keys, key_states), dim=-2), torch.cat((values, value_states), dim=-2)

    def get_seq_length(self) -> int:
        return self.prefix[0].shape[-2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


def prefix_cache(memory: Memory) -> Cache:
    """A cache of prefixes that is never filled further."""
    return Cache(layers=[PrefixLayer(k, v) for k, v in memory])


def pour(cache: Cache, memory: Memory, batch: int) -> Cache:
    """Write the prefix into a cache, once a row."""
    for index, (keys, values) in enumerate(memory):
        cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), index)
    return cache
