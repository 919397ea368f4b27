"""The sequences of a batch, and where their tokens lie in a packed row.

Shapes: B rows, T tokens a row as given, N real tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class Sequences:
    """The sequences in the rows of a batch.

    Args:
        kept: place of each real token in the flattened batch [N].
        opens: whether a sequence begins there [N]; `starts` are the indices [sequences], `sizes` their lengths.
        positions: within the sequence, or as given [N].
    """

    kept: Tensor
    opens: Tensor
    starts: Tensor
    sizes: Tensor
    positions: Tensor

    @classmethod
    def of(
        cls, labels: Tensor, shift_labels: Tensor | None, mask: Tensor | None, positions: Tensor | None
    ) -> Sequences | None:
        """Find them: a row is one, or, without a mask, begins another wherever `positions` start again. None where a loss
        depends on padding (labels on it, or right behind it within a row), or positions are one's own."""
        given = labels if shift_labels is None else shift_labels
        real = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask.bool()
        kept = real.flatten().nonzero()[:, 0]
        if len(kept) == 0 or bool(((given != IGNORED) & ~real).any()):
            return None
        opens = torch.ones_like(kept, dtype=torch.bool)
        opens[1:] = kept[1:] // labels.shape[1] != kept[:-1] // labels.shape[1]
        if positions is not None:
            positions = positions.expand_as(labels).flatten()[kept]
            steps = torch.diff(positions)
            odd = (steps != 1) & ~opens[1:]
            if bool((odd & (steps > 1)).any()) or (mask is not None and bool(odd.any())):
                return None  # places of one's own within a sequence
            opens[1:] |= odd
        holes = (torch.diff(kept) != 1) & ~opens[1:]
        if shift_labels is None and bool((labels.flatten()[kept[1:]][holes] != IGNORED).any()):
            return None
        starts = opens.nonzero()[:, 0]
        sizes = torch.diff(starts, append=starts.new_tensor([len(kept)]))
        if positions is None:
            positions = torch.arange(len(kept)) - starts.repeat_interleave(sizes)
        return cls(kept, opens, starts, sizes, positions)


@dataclass(frozen=True)
class Row:
    """Where real and virtual tokens lie in a packed row.

    Args:
        lengths: tokens of each sequence, its virtual ones included unless they are shared.
        virtual: virtual tokens of a sequence.
        shared: virtual tokens at the row's start that all sequences share.
        tokens: place of each real token [N].
        last_virtual: place of the last virtual token before each sequence.
    """

    lengths: list[int]
    virtual: int
    shared: int
    tokens: Tensor
    last_virtual: Tensor

    @classmethod
    def of(cls, lengths: Tensor, virtual: int, share: bool) -> Row:
        real = torch.arange(int(lengths.sum()))
        if share:
            last = torch.full_like(lengths, virtual - 1)
            return cls(lengths.tolist(), virtual, virtual, real + virtual, last)
        sequence = torch.arange(len(lengths)).repeat_interleave(lengths)
        starts = torch.cumsum(lengths + virtual, 0) - lengths
        return cls((lengths + virtual).tolist(), virtual, 0, real + virtual * (sequence + 1), starts - 1)

    def spread(self, real: Tensor, virtual: Tensor) -> Tensor:
        """The row [length, ...] out of what belongs to real tokens [N, ...] and to virtual ones [virtual, ...]."""
        if not self.virtual:
            return real
        if self.shared:
            return torch.cat((virtual, real))
        places = torch.arange(self.virtual) - self.virtual + 1
        copies = (self.last_virtual[:, None] + places).flatten()
        every = real.new_zeros(len(real) + len(copies), *real.shape[1:])
        every = every.index_copy(0, self.tokens, real)
        repeated = virtual.repeat(len(self.last_virtual), *(1,) * (virtual.dim() - 1))
        return every.index_copy(0, copies, repeated.to(real.dtype))
