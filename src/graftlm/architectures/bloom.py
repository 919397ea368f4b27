"""Bloom's fast path: attention sequence by sequence in packed rows, and its GELU as one operation.

transformers' Bloom knows only its eager attention: scores, an ALiBi tensor and a mask of all rows, the softmax in fp32, and a
GELU written out in Python whose every step keeps a tensor.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomGelu, _get_alibi_slopes, dropout_add

from ..routing import current_plan


class FastBloomGelu(BloomGelu):
    """The same tanh approximation (arXiv:1606.08415)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh") if self.training else super().forward(x)


class SegmentBloomAttention(BloomAttention):
    """Bloom's attention; in a packed training pass each sequence attends to itself, a prefix and shared tokens."""

    def forward(
        self, hidden_states: Tensor, residual: Tensor, alibi: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        plan = current_plan()
        if plan is None or plan.segments is None:
            return super().forward(hidden_states, residual, alibi, attention_mask, *args, **kwargs)
        qkv = self.query_key_value(hidden_states)[0].unflatten(-1, (self.num_heads, 3, self.head_dim))
        q, k, v = (t.transpose(0, 1) for t in qkv.unbind(-2))  # [N, heads, 3, head_dim] -> 3 x [heads, N, head_dim]
        p = self.attention_dropout.p if self.training else 0.0
        context = plan.segments.attend(q, k, v, self.layer_idx, self.inv_norm_factor, p)
        output = self.dense(context.flatten(1)[None])
        return dropout_add(output, residual, self.hidden_dropout, self.training), None


def slopes(module: BloomAttention) -> Tensor:
    """ALiBi's slopes [heads]."""
    return _get_alibi_slopes(module.num_heads, module.query_key_value.weight.device)
