"""The rows that a run trains on, by their lengths: from its data, or given; and the batch that takes the most memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.packing import first_fit
from ..errors import PlanError
from ..training.bases import checked_path, loading
from ..training.joining import TOKENS
from ..training.meters import IGNORE_INDEX
from ..training.schema import Recipe
from ..training.setup import RunData, load_data_of
from .skeleton import config_of

QUANTILE = 0.9


@dataclass(frozen=True)
class Rows:
    """Rows to train on, and to evaluate on.

    Attributes:
        train: prepared rows, each with `input_ids` and `labels`.
        collator: that makes a batch of them.
        held: rows to evaluate on.
        format: name of the data's format.
        prompts: whether there may be prompts to answer.
        data: the run's own data that these rows are from.
    """

    train: Sequence[Any]
    collator: Any
    held: Sequence[Any] = ()
    format: str = ""
    prompts: bool = False
    data: RunData | None = None

    @property
    def lengths(self) -> list[int]:
        return [len(row["input_ids"]) for row in self.train]

    def summary(self) -> dict[str, int]:
        """Their number, the longest and the 0.9 quantile of their lengths, in tokens."""
        sorted_lengths = sorted(self.lengths)
        at = min(int(QUANTILE * len(sorted_lengths)), len(sorted_lengths) - 1)
        return {"rows": len(sorted_lengths), "longest": sorted_lengths[-1], "quantile": sorted_lengths[at],
                "tokens": sum(sorted_lengths)}  # fmt: skip


def rows_of(recipe: Recipe) -> Rows:
    """The recipe's data, tokenised by the base's tokenizer.

    Raises:
        DataError: the data is not there. BaseModelError: there is no tokenizer.
    """
    from transformers import AutoTokenizer

    config, path = config_of(recipe)
    checked_path(recipe.base)
    tokenizer = loading(recipe.base, path, lambda: AutoTokenizer.from_pretrained(path))
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    is_seq2seq = bool(getattr(config, "is_encoder_decoder", False))
    data = load_data_of(recipe, tokenizer, is_seq2seq)
    held = [] if data.held_out_rows is None else list(data.held_out_rows)
    prompts = bool(held) and any(row["labels"][:2] == [IGNORE_INDEX] * 2 for row in held) or is_seq2seq
    return Rows(list(data.train_rows), data.collator, held, data.format.name, prompts, data)


def rows_given(count: int, length: int) -> Rows:
    """So many rows of one length, all labelled, where there is no data.

    Raises:
        PlanError: numbers below 1.
    """
    for name, value in (("rows", count), ("length", length)):
        if value < 1:
            raise PlanError(f"{name}={value}: expected at least 1")
    row = {"input_ids": [3] * length, "labels": [3] * length}
    return Rows([row] * count, stacked)


def stacked(rows: Sequence[Any]) -> dict[str, Tensor]:
    """A batch of rows of one length."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {
        "input_ids": ids,
        "labels": torch.tensor([row["labels"] for row in rows]),
        "attention_mask": torch.ones_like(ids),
    }


def longest_batch(recipe: Recipe, rows: Rows) -> dict[str, Tensor]:
    """The batch of a step that takes the most memory: the longest rows (with packing the fullest pack; with accumulation as
    many batches as the Trainer joins)."""
    order = sorted(range(len(rows.train)), key=lambda i: -len(rows.train[i]["input_ids"]))
    training = recipe.training
    if training.packing:
        lengths = rows.lengths
        if max(lengths) > training.tokens:
            raise PlanError(
                f"an example has {max(lengths)} tokens, more than training.tokens={training.tokens}: raise it, or cut "
                "examples shorter (data.max_length)"
            )
        packs = first_fit(lengths, training.tokens, training.seed)
        chosen = max(packs, key=lambda pack: sum(lengths[i] for i in pack))
        if rows.collator is stacked:
            return stacked([rows.train[i] for i in chosen])
        return tensors(rows.collator([[rows.train[i] for i in chosen]]))
    size = recipe.training.batch_size or 1
    count = size
    while count + size <= size * training.accumulation and sum(
        len(rows.train[i]["input_ids"]) for i in order[: count + size]
    ) <= TOKENS:  # fmt: skip
        count += size
    return tensors(rows.collator([rows.train[i] for i in order[:count]]))


def tensors(batch: dict[str, Any]) -> dict[str, Tensor]:
    """What of a batch goes into the model."""
    return {k: v for k, v in batch.items() if isinstance(v, Tensor)}
