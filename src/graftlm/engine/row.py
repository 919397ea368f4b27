"""Where the tokens of a packed row lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
