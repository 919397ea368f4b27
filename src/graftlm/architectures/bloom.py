"""Bloom's fast path: attention sequence by sequence in packed rows.

transformers' Bloom knows only its eager attention: scores of all rows with an ALiBi tensor and a mask, the softmax in fp32.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.bloom.modeling_bloom import BloomAttention, _get_alibi_slopes, dropout_add

from ..routing import current_scope


def attention(module: Any, otherwise: Any, hidden_states: Tensor, residual: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Bloom's attention; in a packed training pass each sequence attends to itself, a prefix and shared tokens."""
    scope = current_scope()
    if scope is None or scope.attention is None:
        return otherwise(hidden_states, residual, *args, **kwargs)
    qkv = module.query_key_value(hidden_states)[0].unflatten(-1, (module.num_heads, 3, module.head_dim))
    q, k, v = (t.transpose(0, 1) for t in qkv.unbind(-2))  # [N, heads, 3, head_dim] -> 3 x [heads, N, head_dim]
    p = module.attention_dropout.p if module.training else 0.0
    context = scope.attention.attend(q, k, v, module.layer_idx, module.inv_norm_factor, p)
    output = module.dense(context.flatten(1)[None])
    return dropout_add(output, residual, module.hidden_dropout, module.training), None


def slopes(module: BloomAttention) -> Tensor:
    """ALiBi's slopes [heads]."""
    return _get_alibi_slopes(module.num_heads, module.query_key_value.weight.device)
