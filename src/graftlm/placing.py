"""Where virtual tokens stand among a row's own, and the positions that follow from the mask.

Shapes: B rows, T tokens a row as given, P virtual tokens.

Virtual tokens stand next to the real tokens, after left padding, so that a padded row equals the row alone. In a batch
whose rows belong to different adapters, rows with fewer of them are filled with padding on the left::

    given       pad pad  x0  x1  x2         x0  x1  x2 pad pad
    with P=2    pad pad  v0  v1  x0 x1 x2   v0  v1  x0  x1  x2 pad pad
    P=1 of 2    pad pad pad  v0  x0 x1 x2   pad v0  x0  x1  x2 pad pad
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UnsupportedError


@dataclass(frozen=True)
class Front:
    """How many entries (virtual tokens, or a prefix's) stand in front of each row: `most`, and `each` [B, 1] where rows
    differ (else the same number)."""

    most: int
    each: int | Tensor

    @classmethod
    def of(cls, counts: list[int], each: Tensor | None) -> Front:
        """Of groups with these counts; `each` [B] is the group of each row, None where there is only one."""
        if each is None or len(set(counts)) == 1:
            return cls(counts[0], counts[0])
        return cls(max(counts), torch.tensor(counts, device=each.device)[each][:, None])

    def __bool__(self) -> bool:
        return self.most > 0

    @property
    def even(self) -> bool:
        return isinstance(self.each, int)

    def ones(self, mask: Tensor) -> Tensor:
        """The entries' part of an attention mask [B, T]: [B, most], ones on the right, zeros where a row has fewer."""
        places = torch.arange(self.most, device=mask.device)
        return (places >= self.most - self.each).to(mask.dtype).expand(mask.shape[0], -1)


def positions_from_mask(mask: Tensor) -> Tensor:
    """Position ids [B, T] of a 2D attention mask [B, T]: 0 for the first attended token of each row, padding clamped."""
    return (mask.long().cumsum(-1) - 1).clamp_min_(0)


def without_holes(mask: Tensor) -> Tensor:
    """A mask [B, T] with all ones from each row's first attended token to its last: what it leaves out in their midst has a
    position in the base, unlike padding."""
    ones = mask.bool().long()
    return (ones.cummax(-1).values & ones.flip(-1).cummax(-1).values.flip(-1)).to(mask.dtype)


def virtual_order(mask: Tensor, front: Front, to_left: bool = False) -> Tensor:
    """Where each place of a row with virtual tokens comes from.

    mask [B, T] of ones and zeros; P = `front.most`. Returns [B, P + T]: an index below P is that virtual token, an index
    `P + t` is given token t. A row with fewer virtual tokens has the last of the P; the others stand at its left end.
    With `to_left` right padding is moved to the left (for heads that read the last place).
    """
    batch, length = mask.shape
    count, missing = front.most, front.most - front.each
    real = mask.bool()
    places = torch.arange(length, device=mask.device).expand(batch, length)
    first = torch.where(real, places, length).amin(-1, keepdim=True) % length
    if to_left:  # what is behind a row's last real token comes before its first
        behind = torch.where(real, places, -1).amax(-1, keepdim=True) + 1
        places, first = (places + behind) % length, (first - behind) % length
    slot = torch.arange(count + length, device=mask.device).expand(batch, -1)
    start = first + missing  # of the virtual tokens
    given = torch.where(slot < start, slot - missing, slot - count).clamp_min_(0)
    virtual = (slot >= start) & (slot < first + count)
    placed = torch.where(virtual, slot - first, count + places.gather(1, given))
    return placed if front.even else torch.where(slot < missing, slot, placed)


def real_first(mask: Tensor) -> Tensor:
    """Order [B, T] that puts each row's first real token first, and the padding on its left last."""
    length = mask.shape[1]
    places = torch.arange(length, device=mask.device).expand_as(mask)
    first = torch.where(mask.bool(), places, length).amin(-1, keepdim=True)
    return (places + first) % length


def reorder(given: Tensor, order: Tensor) -> Tensor:
    """given [B, T, ...] in the order [B, T] of its token axis."""
    index = order.view(*order.shape, *(1,) * (given.dim() - 2)).expand(-1, -1, *given.shape[2:])
    return given.gather(1, index)


def place_virtual(virtual: Tensor, given: Tensor, order: Tensor) -> Tensor:
    """Put virtual tokens among the given ones.

    virtual [B, P, ...], given [B, T, ...], order [B, P + T] from `virtual_order`; returns [B, P + T, ...].
    """
    return reorder(torch.cat((virtual.to(given.dtype), given), dim=1), order)


def restore_order(placed: Tensor, order: Tensor) -> Tensor:
    """Undo `place_virtual`: [B, P + T, ...] back to the P virtual tokens first, then the T tokens as they were given."""
    return reorder(placed, torch.argsort(order, dim=-1))


def chained(first: Tensor, then: Tensor, count: int) -> Tensor:
    """The order [B, P + T] that puts P virtual tokens among tokens which were in the order `first` [B, T] before."""
    virtual = torch.arange(count, device=first.device).expand(len(first), -1)
    return torch.cat((virtual, first + count), dim=1).gather(1, then)


def restore_attention(weights: Tensor, queries: Tensor | None, keys: Tensor) -> Tensor:
    """Attention weights [B, heads, Q, K] with both axes in the given order, virtual tokens first (behind a prefix).

    `keys` [B, n] is the order of the last n of all keys. Layers with a sliding window have the last ones only: the others'
    weights are zero.
    """
    missing = keys.shape[1] - weights.shape[-1]
    if weights.dim() != 4 or (missing > 0 and queries is not None):
        raise UnsupportedError(
            f"output_attentions with virtual tokens: weights of shape {tuple(weights.shape)} cannot be put in the order of "
            f"the {keys.shape[1]} places (this model's attention is local). Leave output_attentions out."
        )
    weights = F.pad(weights, (max(missing, 0), 0))
    if queries is not None and weights.shape[2] == queries.shape[1]:
        weights = restore_order(weights.transpose(1, 2), queries).transpose(1, 2)
    front = weights.shape[-1] - keys.shape[1]
    restored = restore_order(weights[..., front:].permute(0, 3, 1, 2), keys).permute(0, 2, 3, 1)
    return torch.cat((weights[..., :front], restored), dim=-1)
