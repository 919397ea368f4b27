"""What one of several processes has of a batch, and what its loss counts among theirs.

The rows of an update are dealt out to N processes, and each goes backward from a loss of its own, L_i; the gradients' mean
over the processes is taken. For that to be the gradient of the loss over all rows (labels c_i of process i, c of all)::

    L_i = N * sum of its labels' losses / c + penalty  =  N * c_i / c * mean of its labels' losses + penalty

Which process has which of these rows changes no result, but all wait for the one with the most tokens: rows are dealt out
by their lengths (`Dealt`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from .meters import IGNORE_INDEX

LABELS = ("labels", "shift_labels")


def own_rows(accelerator: Any, inputs: dict[str, Any]) -> int | None:
    """How many rows of a batch are there once: the last batch among several processes is filled up with rows from the start
    of the data. None where all are."""
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader:
        return None
    remainder = state.remainder if state.remainder >= 0 else left_over(state.active_dataloader)
    if not remainder:
        return None
    size = next((v.shape[0] for v in inputs.values() if isinstance(v, Tensor) and v.dim()), 0)
    kept = min(max(remainder - size * accelerator.process_index, 0), size)
    return None if kept == size else kept


class Dealt(Sampler):
    """The rows of a sampler, those of one update dealt out to processes so that each has about as many tokens.

    Args:
        sampler: gives row numbers, the same in all processes; a process takes `size` of them, the next process the next.
        lengths: of rows, by number.
        size: rows of a process's batch.
        count: of processes.
    """

    def __init__(self, sampler: Any, lengths: list[int], size: int, count: int) -> None:
        self.sampler, self.lengths, self.size, self.count = sampler, lengths, size, count

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        update: list[int] = []
        for row in self.sampler:
            update.append(row)
            if len(update) == self.size * self.count:
                yield from self.deal(update)
                update = []
        yield from update  # accelerate fills up a last one

    def deal(self, rows: list[int]) -> list[int]:
        """The longest row goes to the process with the fewest tokens so far that has room."""
        hands: list[list[int]] = [[] for _ in range(self.count)]
        tokens = [0] * self.count
        for row in sorted(rows, key=lambda r: -self.lengths[r]):
            free = [i for i in range(self.count) if len(hands[i]) < self.size]
            least = min(free, key=lambda i: tokens[i])
            hands[least].append(row)
            tokens[least] += self.lengths[row]
        return [row for hand in hands for row in hand]


def deal_out(loader: Any, dataset: Dataset | None) -> None:
    """Have a loader of several processes deal rows out by length, where a data set of tokens tells lengths."""
    shard = getattr(loader, "batch_sampler", None)
    if not isinstance(shard, BatchSamplerShard) or shard.num_processes == 1 or shard.split_batches:
        return
    inner = shard.batch_sampler
    if not isinstance(getattr(inner, "sampler", None), Sampler) or inner.batch_size == 1:
        return
    lengths = token_lengths(dataset)
    if lengths is not None:
        inner.sampler = Dealt(inner.sampler, lengths, inner.batch_size, shard.num_processes)


def token_lengths(dataset: Any) -> list[int] | None:
    """Tokens of the rows of a `datasets.Dataset`; None of other data, and where a row has no list of them."""
    if "input_ids" not in (getattr(dataset, "column_names", None) or ()) or not hasattr(dataset, "with_format"):
        return None
    from pyarrow import types
    from pyarrow.compute import list_value_length

    column = dataset.select_columns("input_ids").with_format("arrow")[:]["input_ids"]
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    if column.null_count or not any(is_kind(column.type) for is_kind in lists):
        return None
    return list_value_length(column).to_pylist()


def left_over(loader: Any) -> int:
    """Rows in the last batch of an epoch that was resumed in its middle, where accelerate counts none; 0: a whole batch."""
    skipping = getattr(loader, "batch_sampler", None)
    if not isinstance(skipping, SkipBatchSampler):
        return 0
    own = skipping.batch_sampler
    whole = own.batch_size * (1 if own.split_batches else own.num_processes)
    return 0 if own.drop_last else len(loader.dataset) % whole


def without_fillers(accelerator: Any, inputs: Any) -> Any:
    """A batch whose filling rows have no labels, where labels are classes or tokens."""
    kept = own_rows(accelerator, inputs) if isinstance(inputs, dict) and has_classes(inputs) else None
    if kept is None:
        return inputs
    changed = {name: inputs[name].clone() for name in LABELS if inputs.get(name) is not None}
    for labels in changed.values():
        labels[kept:] = IGNORE_INDEX
    return inputs | changed


def has_classes(inputs: dict[str, Any]) -> bool:
    """Whether a batch has labels that -100 takes out of the loss."""
    labels = inputs.get("labels")
    return isinstance(labels, Tensor) and not labels.is_floating_point() and labels.dim() > 0


def cut(inputs: dict[str, Any], kept: int) -> dict[str, Any]:
    """The first rows of a batch; empty without any."""
    size = next((v.shape[0] for v in inputs.values() if isinstance(v, Tensor) and v.dim()), 0)
    first = {k: v[:kept] if isinstance(v, Tensor) and v.dim() and v.shape[0] == size else v for k, v in inputs.items()}
    return first if kept else {}


def weighed(mean: Tensor, labels: int, of_all: int, processes: int) -> Tensor:
    """The mean loss of a process's rows, weighed by its part of the labels of all processes' (see above). Without labels it
    is the mean of nothing, NaN, and gives nothing."""
    return mean * (processes * labels / of_all) if labels else mean.nan_to_num(0.0) * 0.0
