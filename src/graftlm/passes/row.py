"""The sequences of a batch, and where their tokens lie in a packed row.

Shapes: B rows, T tokens a row as given, N real tokens.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.attention import Piece

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
            positions = kept - kept[starts].repeat_interleave(sizes)
        return cls(kept, opens, starts, sizes, positions)

    def sorted(self, groups: Tensor) -> tuple[Sequences, Tensor]:
        """The sequences (and their groups) in the order of their groups."""
        order = torch.argsort(groups, stable=True)
        if bool((order[1:] > order[:-1]).all()):
            return self, groups
        spans = [torch.arange(a, a + n) for a, n in zip(self.starts[order], self.sizes[order], strict=True)]
        tokens, sizes = torch.cat(spans), self.sizes[order]
        made = Sequences(self.kept[tokens], self.opens[tokens], sizes.cumsum(0) - sizes, sizes, self.positions[tokens])
        return made, groups[order]


@dataclass(frozen=True)
class Row:
    """Where real and virtual tokens lie in a packed row. Sequences of one group (one composition of adapters) stand side by
    side.

    Args:
        pieces: what attends by itself: shared virtual tokens, and the sequences.
        virtual: places of each sequence's virtual tokens, (first, last + 1); (0, 0) for none.
        tokens: place of each real token [N].
        owners: group of each place.
        order: what lies side by side: a group's virtual tokens (group, None), or real tokens (first, last + 1).
    """

    pieces: list[Piece]
    virtual: list[tuple[int, int]]
    tokens: Tensor
    owners: Tensor
    order: list[tuple[int, int | None]]

    @classmethod
    def of(cls, lengths: list[int], groups: list[int], counts: list[int], memories: list[int | None], share: bool) -> Row:
        """Lay out sequences of `lengths` real tokens.

        Args:
            groups: the group of each sequence.
            counts, memories: of each group, its virtual tokens and which memory it attends to.
            share: one copy of virtual tokens for all sequences of a group; where it has only one, they are its own.
        """
        pieces, virtual, tokens, owners = [], [], [], []
        order: list[tuple[int, int | None]] = []
        shared: dict[int, tuple[int, int]] = {}
        place = read = 0
        several = {group for group, many in Counter(groups).items() if share and many > 1}
        for length, group in zip(lengths, groups, strict=True):
            count, front = counts[group], shared.get(group, (0, 0))
            begin = place
            if count and group not in shared:
                place += count
                order.append((group, None))
                if group in several:
                    front = shared[group] = (begin, place)
                    pieces.append(Piece(begin, place, memory=memories[group]))
                    owners += [group] * count
                    begin = place
            own = (begin, place) if count and group not in several else front
            pieces.append(Piece(begin, place + length, front, memories[group]))
            owners += [group] * (place + length - begin)
            virtual.append(own)
            tokens.append(torch.arange(place, place + length))
            order.append((read, read + length))
            place, read = place + length, read + length
        return cls(pieces, virtual, torch.cat(tokens), torch.tensor(owners), order)

    def spread(self, real: Tensor, virtual: list[Tensor | None]) -> Tensor:
        """The row [length, ...] out of what belongs to real tokens [N, ...] and to each group's virtual ones [P, ...]."""
        if not any(self.virtual[i] != (0, 0) for i in range(len(self.virtual))):
            return real
        parts = [virtual[a] if b is None else real[a:b] for a, b in self.order]
        return torch.cat([p.to(real.dtype) for p in parts if p is not None])
