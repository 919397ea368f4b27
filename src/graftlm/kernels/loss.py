"""Cross-entropy of a frozen head without its logits.

Shapes: N labelled places, H hidden size, V vocabulary; hidden [N, H], weight [V, H], targets [N].

The vocabulary is gone through in tiles with a running maximum and sum (online softmax, arXiv:1805.02867); the gradient with
respect to the hidden states, ``(softmax - onehot) W``, is made tile by tile in the same pass, so that nothing of size
[N, V] ever exists and the backward pass is one multiplication. (Fusing head and loss: arXiv:2410.10989.)

With label smoothing e (arXiv:1512.00567) the loss of a place is ``logsumexp - (1 - e) logit[target] - e mean(logits)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .linear import MULTIPLE, even_rows, plain_product, working_dtype
from .order import first_order

TILE = 4096  # rows of the head's weight at a time, on CPUs
ROWS = 256  # hidden states at a time
DEVICE_ELEMENTS = 2**27  # logits at a time elsewhere


@dataclass(frozen=True)
class HeadForm:
    """What a model does to its head's output: ``logits = softcap * tanh(scale * raw / softcap)`` (None: no cap)."""

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, raw: Tensor) -> Tensor:
        """raw [..., V] -> logits [..., V]."""
        raw = raw * self.scale if self.scale != 1 else raw
        return raw if self.softcap is None else torch.tanh(raw / self.softcap) * self.softcap

    @classmethod
    def recognise(cls, raw: Tensor, logits: Tensor, softcap: float | None) -> HeadForm | None:
        """The form that made `logits` out of `raw` (same shape), or None. `softcap`: what the configuration says."""
        if raw.shape != logits.shape:
            return None
        tolerance = 1e-4 if raw.dtype is torch.float32 and logits.dtype is torch.float32 else 2e-2
        raw, logits = raw.float(), logits.float()
        length = float((raw * raw).sum())
        scale = float((raw * logits).sum()) / length if length else 1.0
        forms = [cls(softcap=float(softcap))] if softcap else []  # first: for small logits it looks like none
        forms.append(cls(scale=1.0 if abs(scale - 1) < 1e-3 else scale))
        return next((f for f in forms if torch.allclose(f.apply(raw), logits, rtol=tolerance, atol=tolerance)), None)


def token_losses(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, form: HeadForm,
    dtype: torch.dtype | None = None, smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """Losses [N] in nats, fp32, of a head whose weight and bias are frozen. The gradient goes to `hidden`.

    Products are made in `dtype` (the weight's; fp32 where the processor is faster in it), sums in fp32. `smoothing`: share
    of the target spread over the vocabulary.

    Raises:
        IndexError: a target outside the vocabulary.
    """
    if len(targets) and not (int(targets.min()) >= 0 and int(targets.max()) < len(weight)):
        raise IndexError(
            f"labels from {int(targets.min())} to {int(targets.max())}: expected ids of the {len(weight):,} entries of the "
            "vocabulary, or -100 for places without a label"
        )
    dtype = working_dtype(dtype or weight.dtype, hidden.device)
    return _TokenLosses.apply(hidden, weight, bias, targets, form, dtype, smoothing)


def chunked_losses(head: Any, hidden: Tensor, targets: Tensor, form: HeadForm, smoothing: float = 0.0) -> Tensor:
    """The same for a head of any kind (trained, adapted, quantised): logits of `ROWS` places at a time, made again in the
    backward pass."""

    def losses(rows: Tensor, wanted: Tensor) -> Tensor:
        logits = form.apply(head(rows)).float()
        return F.cross_entropy(logits, wanted, reduction="none", label_smoothing=smoothing)

    if hidden.shape[0] <= ROWS:
        return losses(hidden, targets)
    parts = zip(hidden.split(ROWS), targets.split(ROWS), strict=True)
    return torch.cat([checkpoint(losses, rows, wanted, use_reentrant=False) for rows, wanted in parts])


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, form: HeadForm,
        dtype: torch.dtype, smoothing: float,
    ) -> Tensor:  # fmt: skip
        count = hidden.shape[0]
        filler = even_rows(count)
        x = F.pad(hidden.detach().to(dtype), (0, 0, 0, filler))
        targets = F.pad(targets, (0, filler))
        losses = torch.empty(len(x), device=x.device)
        gradient = x.new_empty(x.shape, dtype=hidden.dtype) if ctx.needs_input_grad[0] else None
        rows, tile = _tiling(x, weight)
        level = weight.sum(0, dtype=torch.float32) / len(weight) if smoothing and form.softcap is None else None
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            wants = gradient is not None
            losses[part], made = _rows(x[part], weight, bias, targets[part], form, tile, wants, smoothing, level)
            if gradient is not None and made is not None:
                gradient[part] = made
        ctx.save_for_backward(None if gradient is None else gradient[:count])
        return losses[:count]

    @staticmethod
    @first_order
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return (gradient * outer[:, None]).to(gradient.dtype), None, None, None, None, None, None


def _tiling(x: Tensor, weight: Tensor) -> tuple[int, int]:
    """Hidden states and vocabulary entries at a time."""
    if x.device.type == "cpu":
        blocks = max(1, -(-len(x) // ROWS))
        return max(1, -(-len(x) // blocks // MULTIPLE)) * MULTIPLE, TILE
    return max(1, DEVICE_ELEMENTS // weight.shape[0]), weight.shape[0]


def _rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, form: HeadForm, tile: int,
    wants_gradient: bool, smoothing: float, level: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Losses [n] and their gradient [n, H] of a few hidden states x [n, H], over all tiles of the vocabulary.

    level: the gradient of the mean logit [H] where it is the same for all x.
    """
    count, vocabulary = x.shape[0], weight.shape[0]
    highest = torch.full((count, 1), -torch.inf, device=x.device)
    total = torch.zeros(count, 1, device=x.device)
    pull = torch.zeros(x.shape, device=x.device)  # sum of exp(logit - highest) W, later softmax W
    mean = torch.zeros(count, 1, device=x.device)  # of the logits; with smoothing only
    for start in range(0, vocabulary, tile):
        part = weight[start : start + tile].to(x.dtype)
        raw = plain_product(x, part).float()
        if bias is not None:
            raw += bias[start : start + tile]
        logits, slope = _formed(raw, form)
        if smoothing:
            mean.add_(logits.sum(-1, keepdim=True), alpha=1 / vocabulary)
            if slope is not None and wants_gradient:
                own = plain_product(slope.to(part.dtype), part.t()).float() / vocabulary
                level = own if level is None else level + own
        before, highest = highest, torch.maximum(highest, logits.amax(-1, keepdim=True))
        rescale = torch.exp(before - highest)
        shares = (logits - highest if slope is not None else logits.sub_(highest)).exp_()
        total.mul_(rescale).add_(shares.sum(-1, keepdim=True))
        if wants_gradient:
            steep = shares if slope is None else shares * slope
            pull.mul_(rescale).add_(plain_product(steep.to(part.dtype), part.t()))
    chosen = weight[targets]
    raw = (x.float() * chosen.float()).sum(-1, keepdim=True).to(x.dtype).float()
    if bias is not None:
        raw = raw + bias[targets][:, None]
    logit, slope = _formed(raw, form)
    losses = highest + total.log() - (1 - smoothing) * logit - smoothing * mean
    if not wants_gradient:
        return losses[:, 0], None
    chosen = chosen.float() if slope is None else chosen.float() * slope
    gradient = pull.div_(total).sub_(chosen, alpha=1 - smoothing)
    if level is not None:
        gradient.sub_(level, alpha=smoothing)
    return losses[:, 0], gradient.mul_(form.scale) if form.scale != 1 else gradient


def _formed(raw: Tensor, form: HeadForm) -> tuple[Tensor, Tensor | None]:
    """Logits of raw products, and the cap's derivative (None: 1)."""
    if form.scale != 1:
        raw = raw * form.scale
    if form.softcap is None:
        return raw, None
    bent = torch.tanh(raw / form.softcap)
    return bent * form.softcap, 1 - bent * bent
