"""What one of several processes has of a batch, and what its loss counts among theirs.

The rows of an update are dealt out to N processes, and each goes backward from a loss of its own, L_i; the gradients' mean
over the processes is taken. For that to be the gradient of the loss over all rows (labels c_i of process i, c of all)::

    L_i = N * sum of its labels' losses / c + penalty  =  N * c_i / c * mean of its labels' losses + penalty
"""

from __future__ import annotations

from typing import Any

from accelerate.data_loader import SkipBatchSampler
from torch import Tensor

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
