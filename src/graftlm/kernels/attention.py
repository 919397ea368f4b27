"""Causal attention of several sequences that lie one after the other in one row, each for itself.

Shapes: N tokens of the row, H heads, G key-value heads (H a multiple), D head_dim; M prefix entries a layer, F shared
tokens, L tokens of a sequence.

    row      s s | a a a | b b b b b | c c     a: attends to memory p, s, a up to itself
    memory   p p p p  (keys and values         b: attends to memory p, s, b up to itself
              that are not part of the row)    c: attends to c up to itself

No padding is computed. On CPUs prefixes and shared virtual tokens are not copied for every sequence at once; short sequences
go through plain batched products with a backward pass of their own (it beats the fused kernel's there), very small ones of
one length together, long ones through `scaled_dot_product_attention`, which keeps no probabilities. On GPUs all go through
`varlen` at once, with such keys copied.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import varlen
from .dropout import is_cheap, keep_mask
from .linear import working_dtype
from .order import first_order
from .piece import Piece

_FEW = 2**15  # elements of a sequence's queries up to which its products are made together with its neighbours'
_MANY = 2**18  # of all that are made together, about
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
        self._buckets: dict[int, list[_Bucket]] = {}
        self._layout: varlen.Layout | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float, p: float = 0.0) -> Tensor:
        """q [H, N, D], k and v [G, N, D] of any strides -> [N, H, D]. `p`: dropout of the probabilities."""
        kind = q.device.type
        given = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else q.dtype
        dtype = working_dtype(given, q.device)
        memory = [t for m in self.memories for t in m[layer]]
        with torch.autocast(kind, enabled=False):
            flash = not p and self.slopes is None and varlen.takes(q.device, dtype)
            if self.longest < LONG and not flash:
                return _Short.apply(q, k, v, self, dtype, scale, p, *memory).to(given)
            q, k, v, *memory = (t.to(dtype) for t in (q, k, v, *memory))
            if flash:
                if self._layout is None:
                    self._layout = varlen.Layout(self.pieces, [t.shape[1] for t in memory[::2]], q.device)
                return varlen.attend(q, k, v, self._layout, memory, scale)
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

    def buckets(self, width: int) -> list[_Bucket]:
        """The sequences, those together whose own products are so small that calls cost more. width: H * D."""
        if width not in self._buckets:
            made: list[_Bucket] = []
            for start, end, front, memory in (p for p in self.pieces if p.end > p.start):
                length = end - start
                alike = _Bucket(1, length, start, front, memory)
                last = made[-1] if made and length * width <= _FEW else alike
                follows = last.start + last.sequences * length == start and last._replace(sequences=1, start=start) == alike
                if follows and last.sequences * length * width < _MANY:  # keys before the sequences are copied for each
                    made[-1] = last._replace(sequences=last.sequences + 1)
                else:
                    made.append(alike)
            self._buckets[width] = made
        return self._buckets[width]

    def mask(self, length: int, before: int, groups: int, heads: int, like: Tensor, count: int = 1) -> Tensor:
        """What is added to scores [count * groups (or 1), heads / groups * length, before + length]: 0, ALiBi or -inf."""
        key = (length, before, groups, heads, like.dtype, count)
        if key not in self._masks:
            later = torch.full((length, length), -torch.inf, device=like.device).triu_(1)
            made = F.pad(later, (before, 0))
            if self.slopes is None:  # the same for all heads
                made = made.repeat(heads // groups, 1)[None]
            else:
                places = torch.arange(before + length, device=like.device)
                made = made + (self.slopes.to(like.device).float()[:, None, None] * places).to(like.dtype)
                made = made.reshape(groups, heads // groups * length, -1).repeat(count, 1, 1)
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


class _Bucket(NamedTuple):
    """Sequences of one length, one after the other, that see the same memory and shared tokens: one batched product for all.

    Args:
        sequences, length: n of them, L tokens each.
        start: of the first.
        front, memory: as in `Piece`.
    """

    sequences: int
    length: int
    start: int
    front: tuple[int, int]
    memory: int | None

    def places(self, t: Tensor) -> Tensor:
        """Its tokens of t [X, N, D]: [X, L, D], or of several sequences [n, X, L, D]."""
        part = t[:, self.start : self.start + self.sequences * self.length]
        return part if self.sequences == 1 else part.unflatten(1, (self.sequences, self.length)).transpose(0, 1)

    def keys(self, own: Tensor, memory: list[Tensor], which: int) -> Tensor:
        """Keys (`which` 0) or values (1) [n * G, M + F + L, D] that they attend to: memory, shared tokens, their own."""
        low, high = self.front
        if not high and self.memory is None and self.sequences == 1:
            return self.places(own)
        parts = [self.places(own)]
        if high > low:
            parts.insert(0, own[:, low:high])
        if self.memory is not None:
            parts.insert(0, memory[2 * self.memory + which])
        if self.sequences > 1:
            parts = [t if t.dim() == 4 else t.expand(self.sequences, *t.shape) for t in parts]
        together = parts[0] if len(parts) == 1 else torch.cat(parts, -2)
        return together if together.dim() == 3 else together.flatten(0, 1)

    def queries(self, t: Tensor, groups: int) -> Tensor:
        """Its tokens of t [H, N, D] as [n * groups, H / groups * L, D]: heads that share keys side by side."""
        part = self.places(t)
        return (
            part
            if part.shape[0] == groups and self.sequences == 1
            else part.reshape(self.sequences * groups, -1, t.shape[2])
        )

    def put(self, t: Tensor, out: Tensor, scale: float = 1.0) -> None:
        """``scale * t`` [n * X or groups, …, D] into its tokens of out [X, N, D]."""
        place = self.places(out)
        t = t if t.shape == place.shape else t.reshape(place.shape)
        torch.mul(t, scale, out=place) if scale != 1 else place.copy_(t)


class _Short(torch.autograd.Function):
    """Batched products in `dtype` for each bucket of sequences. Kept: q, k, v as they come, and the probabilities."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Segments, dtype: torch.dtype, scale: float, p: float,
        *memory: Tensor,
    ) -> Tensor:  # fmt: skip
        given = q, k, v, *memory
        q, k, v, *memory = (t.to(dtype) for t in given)  # type: ignore[assignment]
        heads, count, width = q.shape
        groups = k.shape[0]
        out = q.new_empty(count, heads, width)
        kept: list[Tensor] = []
        buckets = segments.buckets(heads * width)
        for bucket in buckets:
            all_k, all_v = (bucket.keys(t, memory, which) for which, t in enumerate((k, v)))  # type: ignore[arg-type]
            before = all_k.shape[1] - bucket.length
            mask = segments.mask(bucket.length, before, groups, heads, q, bucket.sequences)
            scores = torch.baddbmm(mask, bucket.queries(q, groups), all_k.transpose(1, 2), alpha=scale)
            shares = torch.softmax(scores, -1)
            kept.append(shares)
            if p:
                kept.append(_mask_of(shares, p))
                shares = shares * kept[-1]
            bucket.put(torch.bmm(shares, all_v), out.transpose(0, 1))
        ctx.save_for_backward(*given, *kept)
        ctx.rest = buckets, scale, bool(p), len(memory)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        buckets, scale, dropped, memories = ctx.rest
        saved = ctx.saved_tensors  # asked for once: a checkpoint gives them out a single time
        given, kept = saved[: 3 + memories], saved[3 + memories :]
        q, k, v, *memory = (t.to(gradient.dtype) for t in given)
        remaining = iter(kept)
        heads, count, width = q.shape
        groups = k.shape[0]
        # token-major, as projections are laid out, so that no copy follows
        to_q, to_k, to_v = (t.new_empty(count, t.shape[0], width).transpose(0, 1) for t in (q, k, v))
        to_memory = [torch.zeros_like(t, dtype=torch.float32) for t in memory]
        shared: dict[tuple[int, int], list[Tensor]] = {}  # the gradient of shared tokens is the sum over sequences
        grad = gradient.transpose(0, 1)
        for bucket in buckets:
            shares = next(remaining)
            mask = next(remaining) if dropped else None
            all_k, all_v = (bucket.keys(t, memory, which) for which, t in enumerate((k, v)))
            grad_i = bucket.queries(grad, groups)
            made_v = torch.bmm((shares if mask is None else shares * mask).transpose(1, 2), grad_i)
            to_shares = torch.bmm(grad_i, all_v.transpose(1, 2))
            if mask is not None:
                to_shares.mul_(mask)
            to_scores = torch._softmax_backward_data(to_shares, shares, -1, shares.dtype)
            made_k = torch.bmm(to_scores.transpose(1, 2), bucket.queries(q, groups))
            bucket.put(torch.bmm(to_scores, all_k), to_q, scale)
            prefix = 0 if bucket.memory is None else memory[2 * bucket.memory].shape[1]
            before = made_k.shape[1] - bucket.length
            for which, (made, out, factor) in enumerate(((made_k, to_k, scale), (made_v, to_v, 1.0))):
                bucket.put(made[:, before:] if before else made, out, factor)
                if not before:
                    continue
                first = made[:, :before]
                if bucket.sequences > 1:
                    first = first.unflatten(0, (bucket.sequences, groups)).sum(0, dtype=torch.float32)
                if bucket.memory is not None:
                    to_memory[2 * bucket.memory + which].add_(first[:, :prefix], alpha=factor)
                if before > prefix:
                    if bucket.front not in shared:
                        like = groups, before - prefix, width
                        shared[bucket.front] = [t.new_zeros(like, dtype=torch.float32) for t in (k, v)]
                    shared[bucket.front][which].add_(first[:, prefix:], alpha=factor)
        for (low, high), (sum_k, sum_v) in shared.items():
            to_k[:, low:high] += sum_k.to(k.dtype)
            to_v[:, low:high] += sum_v.to(v.dtype)
        found = to_q, to_k, to_v, *to_memory
        to_q, to_k, to_v, *to_memory = (t.to(g.dtype) for t, g in zip(found, given, strict=True))
        return to_q, to_k, to_v, None, None, None, None, *to_memory


def _mask_of(shares: Tensor, p: float) -> Tensor:
    """Dropout's factors [like shares]: 0, or 1 / (1 - p)."""
    if is_cheap(shares, p):
        kept, scale = keep_mask(shares, p)
        return kept.to(shares.dtype).mul_(scale)
    return F.dropout(torch.ones_like(shares), p)
