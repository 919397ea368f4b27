"""Steps of a token budget: examples put together into rows that hold several sequences, without padding.

    packs   [a a a a a | b b b]        positions  0 1 2 3 4 0 1 2
            [c c c | d d | e e e]                 0 1 2 0 1 0 1 2

Which examples share a step is decided once, by first-fit over a shuffled order (Johnson, 1974: at most 1.7 times the fewest
rows), and so is the number of steps; the Trainer shuffles the packs anew each epoch. Each sequence attends to itself only.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graftlm.data._pair import IGNORE_INDEX
from graftlm.data.collators import Rows, _checked
from graftlm.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


class PackedRows:
    """A data set of packs: item i is the list of examples that make up one step's row.

    Args:
        rows: prepared examples with `input_ids`.
        tokens: the budget; no pack is longer.
        seed: of the order in which the examples are placed.

    Raises:
        DataError: an example is longer than the budget, or there are none.
    """

    def __init__(self, rows: Any, tokens: int, seed: int = 0) -> None:
        lengths = [len(ids) for ids in rows["input_ids"]]
        if not lengths:
            raise DataError("there are no examples to pack")
        if max(lengths) > tokens:
            raise DataError(
                f"an example has {max(lengths)} tokens, more than a step's {tokens}: raise the token budget "
                "(training.tokens), or cut examples shorter (data.max_length)"
            )
        self.rows = rows
        self.packs = first_fit(lengths, tokens, seed)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> Any:
        return [self.rows[i] for i in self.packs[index]]


def first_fit(lengths: Sequence[int], budget: int, seed: int) -> list[list[int]]:
    """Indices of `lengths` in groups whose sums stay within the budget."""
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    packs: list[list[int]] = []
    room: list[int] = []
    first = 0  # packs before it are full
    for i in order:
        place = next((p for p in range(first, len(packs)) if room[p] >= lengths[i]), None)
        if place is None:
            packs.append([])
            room.append(budget)
            place = len(packs) - 1
        packs[place].append(i)
        room[place] -= lengths[i]
        while first < len(packs) and room[first] < min(8, budget // 64 + 1):
            first += 1
    return packs


class PackingCollator:
    """Packs (lists of examples) to one row [1, N]: `input_ids`, `position_ids` that start again, `labels`.

    No sequence's first token carries a label: nothing stands before it.
    """

    def __call__(self, packs: Sequence[Rows] | Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        import torch

        rows = _checked([row for pack in packs for row in (pack if isinstance(pack, Sequence) else [pack])])
        ids = [i for row in rows for i in row["input_ids"]]
        positions = [p for row in rows for p in range(len(row["input_ids"]))]
        labels = [x for row in rows for x in [IGNORE_INDEX, *list(row.get("labels", row["input_ids"]))[1:]]]
        made = {"input_ids": ids, "position_ids": positions, "labels": labels}
        return {key: torch.tensor([values], dtype=torch.long) for key, values in made.items()}
