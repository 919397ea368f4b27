"""Causal attention of several sequences that lie one after the other in one row, each for itself.

Shapes: N tokens of the row, H heads, G key-value heads (H a multiple), D head_dim; M prefix entries a layer, F shared
tokens, L tokens of a sequence.

    row      s s | a a a | b b b b b | c c     a: attends to memory p, s, a up to itself
    memory   p p p p  (keys and values         b: attends to memory p, s, b up to itself
              that are not part of the row)    c: attends to c up to itself

No padding is computed. On CPUs neither prefixes nor shared virtual tokens are copied for every sequence; short sequences go
through plain batched products with a backward pass of their own (it beats the fused kernel's there), long ones through
`scaled_dot_product_attention`, which keeps no probabilities. On GPUs all go through `varlen` at once, with such keys copied.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import varlen
from .dropout import is_cheap, keep_mask
from .linear import working_dtype
from .order import first_order
from .piece import Piece

LONG = 320  # tokens of a sequence from which on the fused kernel is used

Memory = list[tuple[Tensor, Tensor]]


class Segments:
    """How one packed row divides into sequences, and what they see besides themselves.

    Args:
        pieces: the sequences; shared tokens are one of their own.
        memories: each for every layer keys and values [G, M, D].
        slopes: ALiBi's slope for each head [H] (arXiv:2108.12409), or None.
    """

    def __init__(self, pieces: list[Piece], memories: list[Memory] | None = None, slopes: Tensor | None = None) -> None:
        self.pieces = pieces
        self.memories = memories or []
        self.slopes = slopes
        self.longest = max((p.end - p.start for p in pieces), default=0)
        self._masks: dict[Any, Tensor] = {}
        self._layout: varlen.Layout | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float, p: float = 0.0) -> Tensor:
        """q [H, N, D], k and v [G, N, D] of any strides -> [N, H, D]. `p`: dropout of the probabilities."""
        kind = q.device.type
        given = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else q.dtype
        dtype = working_dtype(given, q.device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        memory = [t.to(dtype) for m in self.memories for t in m[layer]]
        with torch.autocast(kind, enabled=False):
            if not p and self.slopes is None and varlen.takes(q.device, dtype):
                if self._layout is None:
                    self._layout = varlen.Layout(self.pieces, [t.shape[1] for t in memory[::2]], q.device)
                return varlen.attend(q, k, v, self._layout, memory, scale)
            if self.longest < LONG:
                return _Short.apply(q, k, v, self, scale, p, *memory).to(given)
            return self._long(q, k, v, memory, scale, p).to(given)

    @staticmethod
    def seen(own: Tensor, piece: Piece, memory: list[Tensor], which: int) -> Tensor:
        """Keys (`which` 0) or values (1) [G, M + F + L, D] that a sequence attends to: memory, shared tokens, its own."""
        low, high = piece.front
        parts = [own[:, piece.start : piece.end]]
        if high > low:
            parts.insert(0, own[:, low:high])
        if piece.memory is not None:
            parts.insert(0, memory[2 * piece.memory + which])
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def mask(self, length: int, before: int, groups: int, heads: int, like: Tensor) -> Tensor:
        """What is added to scores [groups (or 1), heads / groups * length, before + length]: 0, ALiBi or -inf."""
        key = (length, before, groups, heads, like.dtype)
        if key not in self._masks:
            later = torch.full((length, length), -torch.inf, device=like.device).triu_(1)
            made = F.pad(later, (before, 0))
            if self.slopes is None:  # the same for all heads
                made = made.repeat(heads // groups, 1)[None]
            else:
                places = torch.arange(before + length, device=like.device)
                made = made + (self.slopes.to(like.device).float()[:, None, None] * places).to(like.dtype)
                made = made.reshape(groups, heads // groups * length, -1)
            self._masks[key] = made.to(like.dtype)
        return self._masks[key]

    def _long(self, q: Tensor, k: Tensor, v: Tensor, memory: list[Tensor], scale: float, p: float) -> Tensor:
        """By the fused kernel, a sequence at a time."""
        made, heads, groups = [], q.shape[0], k.shape[0]
        for piece in self.pieces:
            length = piece.end - piece.start
            all_k, all_v = (self.seen(t, piece, memory, which) for which, t in enumerate((k, v)))
            if groups != heads:
                all_k, all_v = (t.repeat_interleave(heads // groups, 0) for t in (all_k, all_v))
            plain = self.slopes is None and all_k.shape[1] == length
            mask = None if plain else self.mask(length, all_k.shape[1] - length, heads, heads, q)[None]
            own_q = q[None, :, piece.start : piece.end]
            made.append(
                F.scaled_dot_product_attention(
                    own_q, all_k[None], all_v[None], attn_mask=mask, dropout_p=p, is_causal=plain, scale=scale
                )[0]
            )
        return torch.cat(made, 1).transpose(0, 1)


class _Short(torch.autograd.Function):
    """Batched products for each sequence. Kept: q, k, v and the probabilities."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, p: float, *memory: Tensor
    ) -> Tensor:
        heads, count, width = q.shape
        groups = k.shape[0]
        out = q.new_empty(count, heads, width)
        kept: list[Tensor] = []
        for piece in segments.pieces:
            start, end = piece.start, piece.end
            all_k, all_v = (segments.seen(t, piece, memory, which) for which, t in enumerate((k, v)))  # type: ignore[arg-type]
            mask = segments.mask(end - start, all_k.shape[1] - (end - start), groups, heads, q)
            scores = torch.baddbmm(mask, _grouped(q, start, end, groups), all_k.transpose(1, 2), alpha=scale)
            shares = torch.softmax(scores, -1)
            kept.append(shares)
            if p:
                kept.append(_mask_of(shares, p))
                shares = shares * kept[-1]
            out[start:end] = torch.bmm(shares, all_v).view(heads, end - start, width).transpose(0, 1)
        ctx.save_for_backward(q, k, v, *memory, *kept)
        ctx.rest = segments, scale, bool(p), len(memory)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        segments, scale, dropped, memories = ctx.rest
        q, k, v, *rest = ctx.saved_tensors
        memory, remaining = rest[:memories], iter(rest[memories:])
        heads, count, width = q.shape
        groups = k.shape[0]
        # token-major, as projections are laid out, so that no copy follows
        to_q, to_k, to_v = (t.new_empty(count, t.shape[0], width).transpose(0, 1) for t in (q, k, v))
        to_memory = [torch.zeros_like(t, dtype=torch.float32) for t in memory]
        shared: dict[tuple[int, int], list[Tensor]] = {}  # the gradient of shared tokens is the sum over sequences
        grad = gradient.transpose(0, 1)
        for piece in segments.pieces:
            start, end, (low, high), at = piece
            shares = next(remaining)
            mask = next(remaining) if dropped else None
            all_k, all_v = (segments.seen(t, piece, memory, which) for which, t in enumerate((k, v)))
            grad_i = _grouped(grad, start, end, groups)
            made_v = torch.bmm((shares if mask is None else shares * mask).transpose(1, 2), grad_i)
            to_shares = torch.bmm(grad_i, all_v.transpose(1, 2))
            if mask is not None:
                to_shares.mul_(mask)
            to_scores = torch._softmax_backward_data(to_shares, shares, -1, shares.dtype)
            made_k = torch.bmm(to_scores.transpose(1, 2), _grouped(q, start, end, groups))
            made_q = torch.bmm(to_scores, all_k).view(heads, end - start, width)
            torch.mul(made_q, scale, out=to_q[:, start:end])
            prefix = 0 if at is None else memory[2 * at].shape[1]
            before = prefix + high - low
            if at is not None:
                to_memory[2 * at].add_(made_k[:, :prefix], alpha=scale)
                to_memory[2 * at + 1] += made_v[:, :prefix]
            if high > low:
                if (low, high) not in shared:
                    shared[low, high] = [t.new_zeros(groups, high - low, width, dtype=torch.float32) for t in (k, v)]
                shared[low, high][0].add_(made_k[:, prefix:before], alpha=scale)
                shared[low, high][1].add_(made_v[:, prefix:before])
            torch.mul(made_k[:, before:], scale, out=to_k[:, start:end])
            to_v[:, start:end] = made_v[:, before:]
        for (low, high), (sum_k, sum_v) in shared.items():
            to_k[:, low:high] += sum_k.to(k.dtype)
            to_v[:, low:high] += sum_v.to(v.dtype)
        return to_q, to_k, to_v, None, None, None, *(t.to(m.dtype) for t, m in zip(to_memory, memory, strict=True))


def _grouped(t: Tensor, start: int, end: int, groups: int) -> Tensor:
    """Places start to end of t [H, N, D] as [groups, H / groups * L, D]: heads that share keys side by side."""
    part = t[:, start:end]
    return part if t.shape[0] == groups else part.reshape(groups, -1, t.shape[2])


def _mask_of(shares: Tensor, p: float) -> Tensor:
    """Dropout's factors [like shares]: 0, or 1 / (1 - p)."""
    if is_cheap(shares, p):
        kept, scale = keep_mask(shares, p)
        return kept.to(shares.dtype).mul_(scale)
    return F.dropout(torch.ones_like(shares), p)
