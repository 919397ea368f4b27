"""A lean Bloom for the CPU: the same parameters and maths as `transformers.BloomForCausalLM`, less overhead.

Shapes: B sequences, T tokens, D hidden, H heads, V vocabulary. bf16 weights and activations; the training loop keeps
fp32 masters. The head and its loss run in row chunks that stay in cache, with their gradient computed on the way.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BloomConfig

HEAD_CHUNK = 256


def config(vocab_size: int = 16384) -> BloomConfig:
    """The base model's architecture, about 10.5 M parameters."""
    return BloomConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        n_layer=8,
        n_head=4,
        layer_norm_epsilon=1e-5,
        initializer_range=0.02,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        unk_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        tie_word_embeddings=True,
        use_cache=True,
    )


def alibi_mask(heads: int, length: int) -> Tensor:
    """`[H, T, T]`: ALiBi plus causality, as an additive attention mask (heads must be a power of two)."""
    base = 2.0 ** (-(2.0 ** -(math.log2(heads) - 3)))
    slopes = torch.tensor([base ** (power + 1) for power in range(heads)])
    position = torch.arange(length)
    distance = (position[None, :] - position[:, None]).float()
    mask = slopes[:, None, None] * distance
    return mask.masked_fill(distance > 0, -1e4)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """`q`, `k`, `v` `[B * H, T, D / H]`, `mask [B * H, T, T]` -> `[B * H, T, D / H]`.

    In two halves, as the first half of the rows never looks at the second half of the keys; at these sizes this takes
    well under half the time of the fused kernel, which has no fast path for a bias.
    """
    half, scale = q.shape[1] // 2, q.shape[2] ** -0.5

    def rows(part: slice, seen: int) -> Tensor:
        scores = torch.baddbmm(mask[:, part, :seen], q[:, part], k[:, :seen].mT, alpha=scale)
        return torch.softmax(scores, dim=-1) @ v[:, :seen]

    return torch.cat([rows(slice(0, half), half), rows(slice(half, None), k.shape[1])], dim=1)


class TiedHeadLoss(torch.autograd.Function):
    """Mean cross-entropy of `hidden [N, D] @ embedding [V, D].T` against `labels [N]`, in chunks of rows."""

    @staticmethod
    def forward(ctx, hidden: Tensor, embedding: Tensor, labels: Tensor) -> Tensor:
        rows = hidden.shape[0]
        grad_hidden, grad_embedding = torch.empty_like(hidden), torch.zeros_like(embedding, dtype=torch.float32)
        total = torch.zeros(())
        for start in range(0, rows, HEAD_CHUNK):
            part = slice(start, start + HEAD_CHUNK)
            slope = torch.softmax(hidden[part] @ embedding.T, dim=-1)
            chosen = slope.gather(1, labels[part, None])
            total -= chosen.float().clamp_min(1e-30).log().sum()
            slope.scatter_(1, labels[part, None], chosen - 1)
            grad_hidden[part] = slope @ embedding
            grad_embedding += slope.T @ hidden[part]
        ctx.save_for_backward(grad_hidden.div_(rows), grad_embedding.div_(rows).to(embedding.dtype))
        return total / rows

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_embedding = ctx.saved_tensors
        return grad_hidden * upstream, grad_embedding * upstream, None


class Block(nn.Module):
    """Pre-norm attention and MLP; `query_key_value` rows are laid out `[H, 3, D/H]` as in Bloom."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.input_layernorm = nn.LayerNorm(hidden)
        self.self_attention = nn.ModuleDict(
            {"query_key_value": nn.Linear(hidden, 3 * hidden), "dense": nn.Linear(hidden, hidden)}
        )
        self.post_attention_layernorm = nn.LayerNorm(hidden)
        self.mlp = nn.ModuleDict(
            {"dense_h_to_4h": nn.Linear(hidden, 4 * hidden), "dense_4h_to_h": nn.Linear(4 * hidden, hidden)}
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`x [B, T, D]`, `mask [B * H, T, T]` -> `[B, T, D]`."""
        batch, length, hidden = x.shape
        fused = self.self_attention["query_key_value"](self.input_layernorm(x))
        split = fused.view(batch, length, self.heads, 3, hidden // self.heads).permute(3, 0, 2, 1, 4)
        q, k, v = split.reshape(3, batch * self.heads, length, hidden // self.heads)
        attended = causal_attention(q, k, v, mask).view(batch, self.heads, length, -1)
        x = x + self.self_attention["dense"](attended.transpose(1, 2).reshape(batch, length, hidden))
        inner = F.gelu(self.mlp["dense_h_to_4h"](self.post_attention_layernorm(x)), approximate="tanh")
        return x + self.mlp["dense_4h_to_h"](inner)


class LeanBloom(nn.Module):
    """`state_dict()` has the keys of `BloomForCausalLM` less the `transformer.` prefix."""

    def __init__(self, cfg: BloomConfig) -> None:
        super().__init__()
        hidden = cfg.hidden_size
        self.heads = cfg.n_head
        self.word_embeddings = nn.Embedding(cfg.vocab_size, hidden)
        self.word_embeddings_layernorm = nn.LayerNorm(hidden)
        self.h = nn.ModuleList([Block(hidden, cfg.n_head) for _ in range(cfg.n_layer)])
        self.ln_f = nn.LayerNorm(hidden)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                scale = 1 / math.sqrt(2 * cfg.n_layer) if name.endswith(("attention.dense.weight", "4h_to_h.weight")) else 1
                nn.init.normal_(parameter, std=cfg.initializer_range * scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden_states(self, tokens: Tensor) -> Tensor:
        """`tokens [B, T]` -> `[B, T, D]` after the final norm."""
        x = self.word_embeddings_layernorm(self.word_embeddings(tokens))
        mask = alibi_mask(self.heads, tokens.shape[1]).to(x.dtype).repeat(tokens.shape[0], 1, 1)
        for block in self.h:
            x = block(x, mask)
        return self.ln_f(x)

    def loss(self, rows: Tensor) -> Tensor:
        """Mean next-token loss of `rows [B, T + 1]`."""
        hidden = self.hidden_states(rows[:, :-1])
        return TiedHeadLoss.apply(hidden.flatten(0, 1), self.word_embeddings.weight, rows[:, 1:].flatten())
