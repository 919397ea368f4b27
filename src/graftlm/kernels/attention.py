"""Causal attention of several sequences that lie one after the other in one row, each for itself.

Shapes: N tokens of the row, H heads, G key-value heads (H a multiple), D head_dim; M prefix entries a layer, S shared
tokens.

    row      s s | a a a | b b b b b |         a: attends to prefix, s, a up to itself
    lengths       3       5                    b: attends to prefix, s, b up to itself
    memory   p p p p  (keys and values that all sequences see; not part of the row)

No padding is computed, and neither the prefix nor shared virtual tokens are copied for every sequence. Short sequences go
through plain batched products with a backward pass of their own (it beats the fused kernel's on CPUs there), long ones
through `scaled_dot_product_attention`, which keeps no probabilities.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import is_cheap, keep_mask
from .order import first_order

LONG = 320  # tokens of a sequence from which on the fused kernel is used

Memory = list[tuple[Tensor, Tensor]]


class Segments:
    """How one packed row divides into sequences, and what all of them see.

    Args:
        lengths: tokens of each sequence, in their order.
        shared: tokens at the row's start that every sequence attends to.
        memory: for each layer keys and values [G, M, D] that every token attends to.
        slopes: ALiBi's slope for each head [H] (arXiv:2108.12409), or None.
    """

    def __init__(
        self, lengths: list[int], shared: int = 0, memory: Memory | None = None, slopes: Tensor | None = None
    ) -> None:
        self.shared = shared
        self.memory = memory
        self.slopes = slopes
        self.bounds: list[tuple[int, int]] = []
        start = shared
        for length in lengths:
            self.bounds.append((start, start + length))
            start += length
        self.longest = max([shared, *lengths])
        self._masks: dict[Any, Tensor] = {}

    @property
    def prefix(self) -> int:
        """Prefix entries of a layer."""
        return self.memory[0][0].shape[-2] if self.memory else 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float, p: float = 0.0) -> Tensor:
        """q [H, N, D], k and v [G, N, D] of any strides -> [N, H, D]. `p`: dropout of the probabilities."""
        keys, values = self.memory[layer] if self.memory else (None, None)
        kind = q.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else q.dtype
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        if keys is not None and values is not None:
            keys, values = keys.to(dtype), values.to(dtype)
        with torch.autocast(kind, enabled=False):
            if self.longest < LONG:
                return _Short.apply(q, k, v, keys, values, self, scale, p)
            return self._long(q, k, v, keys, values, scale, p)

    def pieces(self) -> list[tuple[int, int, int]]:
        """(start, end, shared tokens seen before) of everything that attends: the shared tokens themselves come first."""
        own = [(0, self.shared, 0)] if self.shared else []
        return own + [(start, end, self.shared) for start, end in self.bounds]

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
                made = made + (self.slopes.float()[:, None, None] * places).to(like.dtype)
                made = made.reshape(groups, heads // groups * length, -1)
            self._masks[key] = made.to(like.dtype)
        return self._masks[key]

    def _long(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, values: Tensor | None, scale: float, p: float
    ) -> Tensor:
        """By the fused kernel, a sequence at a time."""
        pieces = self.pieces()
        sizes = [end - start for start, end, _ in pieces]
        parts = zip(pieces, q.split(sizes, 1), k.split(sizes, 1), v.split(sizes, 1), strict=True)
        made, heads, groups = [], q.shape[0], k.shape[0]
        for (start, end, before), own_q, own_k, own_v in parts:
            seen_k = [t for t in (keys, k[:, :before] if before else None, own_k) if t is not None]
            seen_v = [t for t in (values, v[:, :before] if before else None, own_v) if t is not None]
            all_k, all_v = torch.cat(seen_k, 1), torch.cat(seen_v, 1)
            if groups != heads:
                all_k, all_v = (t.repeat_interleave(heads // groups, 0) for t in (all_k, all_v))
            plain = self.slopes is None and all_k.shape[1] == end - start
            mask = None
            if not plain:
                mask = self.mask(end - start, all_k.shape[1] - (end - start), heads, heads, q)[None]
            made.append(
                F.scaled_dot_product_attention(
                    own_q[None], all_k[None], all_v[None], attn_mask=mask, dropout_p=p, is_causal=plain, scale=scale
                )[0]
            )
        return torch.cat(made, 1).transpose(0, 1)


class _Short(torch.autograd.Function):
    """Batched products for each sequence. Kept: q, k, v and the probabilities."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, values: Tensor | None, segments: Segments,
        scale: float, p: float,
    ) -> Tensor:  # fmt: skip
        heads, count, width = q.shape
        groups = k.shape[0]
        out = q.new_empty(count, heads, width)
        kept: list[Tensor] = []
        for start, end, before in segments.pieces():
            all_k, all_v = (_seen(t, own, start, end, before) for t, own in ((keys, k), (values, v)))
            mask = segments.mask(end - start, all_k.shape[1] - (end - start), groups, heads, q)
            scores = torch.baddbmm(mask, _grouped(q, start, end, groups), all_k.transpose(1, 2), alpha=scale)
            shares = torch.softmax(scores, -1)
            kept.append(shares)
            if p:
                kept.append(_mask_of(shares, p))
                shares = shares * kept[-1]
            out[start:end] = torch.bmm(shares, all_v).view(heads, end - start, width).transpose(0, 1)
        ctx.save_for_backward(q, k, v, keys, values, *kept)
        ctx.rest = segments, scale, bool(p)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        q, k, v, keys, values, *kept = ctx.saved_tensors
        segments, scale, dropped = ctx.rest
        heads, count, width = q.shape
        groups = k.shape[0]
        # token-major, as projections are laid out, so that no copy follows
        to_q, to_k, to_v = (t.new_empty(count, t.shape[0], width).transpose(0, 1) for t in (q, k, v))
        prefix = 0 if keys is None else keys.shape[1]
        front = prefix + segments.shared  # keys before a sequence's own, whose gradient is the sum over sequences
        sum_k, sum_v = (k.new_zeros(groups, front, width, dtype=torch.float32) for _ in range(2))
        grad = gradient.transpose(0, 1)
        remaining = iter(kept)
        for start, end, before in segments.pieces():
            shares = next(remaining)
            mask = next(remaining) if dropped else None
            all_k, all_v = (_seen(t, own, start, end, before) for t, own in ((keys, k), (values, v)))
            grad_i = _grouped(grad, start, end, groups)
            made_v = torch.bmm((shares if mask is None else shares * mask).transpose(1, 2), grad_i)
            to_shares = torch.bmm(grad_i, all_v.transpose(1, 2))
            if mask is not None:
                to_shares.mul_(mask)
            to_scores = torch._softmax_backward_data(to_shares, shares, -1, shares.dtype)
            made_k = torch.bmm(to_scores.transpose(1, 2), _grouped(q, start, end, groups))
            made_q = torch.bmm(to_scores, all_k).view(heads, end - start, width)
            torch.mul(made_q, scale, out=to_q[:, start:end])
            seen = prefix + before
            if seen:
                sum_k[:, :seen] += made_k[:, :seen]
                sum_v[:, :seen] += made_v[:, :seen]
            torch.mul(made_k[:, seen:], scale, out=to_k[:, start:end])
            to_v[:, start:end] = made_v[:, seen:]
        sum_k *= scale
        if segments.shared:
            to_k[:, : segments.shared] += sum_k[:, prefix:].to(k.dtype)
            to_v[:, : segments.shared] += sum_v[:, prefix:].to(v.dtype)
        to_keys = to_values = None
        if keys is not None and values is not None:
            to_keys, to_values = sum_k[:, :prefix].to(keys.dtype), sum_v[:, :prefix].to(values.dtype)
        return to_q, to_k, to_v, to_keys, to_values, None, None, None


def _grouped(t: Tensor, start: int, end: int, groups: int) -> Tensor:
    """Places start to end of t [H, N, D] as [groups, H / groups * L, D]: heads that share keys side by side."""
    part = t[:, start:end]
    return part if t.shape[0] == groups else part.reshape(groups, -1, t.shape[2])


def _seen(front: Tensor | None, own: Tensor, start: int, end: int, before: int) -> Tensor:
    """Keys or values that a sequence attends to: prefix, shared tokens, its own [G, M + before + L, D]."""
    parts = [t for t in (front, own[:, :before] if before else None, own[:, start:end]) if t is not None]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _mask_of(shares: Tensor, p: float) -> Tensor:
    """Dropout's factors [like shares]: 0, or 1 / (1 - p)."""
    if is_cheap(shares, p):
        kept, scale = keep_mask(shares, p)
        return kept.to(shares.dtype).mul_(scale)
    return F.dropout(torch.ones_like(shares), p)
