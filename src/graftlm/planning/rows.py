"""The rows that a run trains on, by their lengths: from its data, or given; and the batch that takes the most memory."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
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
from . import sampling
from .skeleton import config_of

QUANTILE = 0.9
LOOKED_AT = 1000  # held-out rows among which prompts are looked for
MOST_ROWS, MOST_TOKENS = 10**12, 10**6  # of data that is given by its size
KEPT = 4096  # of such rows; they are all alike


@dataclass(frozen=True)
class Part:
    """Rows, of which numbers alone are kept.

    Attributes:
        rows: a sequence of prepared rows, each with `input_ids` and `labels`.
        share: of how many rows each of them stands for one.
    """

    rows: Any = ()
    share: float = 1.0

    @cached_property
    def counted(self) -> tuple[list[int], int]:
        """Tokens of each row, and labelled ones of all."""
        lengths, labelled = list[int](), 0
        for ids, labels in pairs_of(self.rows):
            lengths.append(len(ids))
            labelled += len(labels) - labels.count(IGNORE_INDEX)
        return lengths, labelled

    @property
    def lengths(self) -> list[int]:
        return self.counted[0]

    @property
    def count(self) -> int:
        return round(len(self.rows) * self.share)

    @property
    def tokens(self) -> float:
        return self.share * sum(self.lengths)

    @property
    def labelled(self) -> float:
        return self.share * self.counted[1]

    @property
    def pairs(self) -> float:
        """Of tokens, within their rows."""
        return self.share * sum(n * n for n in self.lengths)

    def longest(self, count: int) -> list[Any]:
        """Rows of the most tokens, the longest first."""
        order = sorted(range(len(self.rows)), key=lambda i: -self.lengths[i])
        return [self.rows[i] for i in order[:count]]


def pairs_of(rows: Any) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids and labels of each row; a data set is read by a thousand rows at a time."""
    if not hasattr(rows, "iter"):
        yield from ((row["input_ids"], row["labels"]) for row in rows)
        return
    for batch in rows.iter(batch_size=1000):
        yield from zip(batch["input_ids"], batch["labels"], strict=True)


@dataclass(frozen=True)
class Rows:
    """Rows to train on, and to evaluate on.

    Attributes:
        train, held: to train on, to evaluate on.
        collator: that makes a batch of them.
        format: name of the data's format.
        prompts: whether there may be prompts to answer.
        data: the run's own data that these rows are from; None where they are a sample of it.
        top: of a sample: the longest rows of all.
        data_bytes: that the run's data takes in memory.
    """

    train: Part
    collator: Any
    held: Part = Part()
    format: str = ""
    prompts: bool = False
    data: RunData | None = None
    top: Part = Part()
    data_bytes: int = 0

    def longest(self, count: int) -> list[Any]:
        """Rows to train on, of the most tokens."""
        found = self.train.longest(count) + self.top.longest(count)
        return sorted(found, key=lambda row: -len(row["input_ids"]))[:count]

    def summary(self) -> dict[str, int]:
        """Their number, the longest and the 0.9 quantile of their lengths, in tokens."""
        lengths = sorted(self.train.lengths)
        at = min(int(QUANTILE * len(lengths)), len(lengths) - 1)
        return {"rows": self.train.count, "longest": max([*lengths[-1:], *self.top.lengths]), "quantile": lengths[at],
                "tokens": round(self.train.tokens)}  # fmt: skip


def rows_of(recipe: Recipe) -> Rows:
    """The recipe's data, tokenised by the base's tokenizer. Of a large file a sample is.

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
    if not sampling.may_sample(recipe.data):
        return rows_in(load_data_of(recipe, tokenizer, is_seq2seq), is_seq2seq)
    with tempfile.TemporaryDirectory() as folder:
        drawn = sampling.sample(Path(recipe.data.source), Path(folder))

        def read(file: Path, **changes: Any) -> RunData:
            data = recipe.data.model_copy(update={"source": str(file)} | changes)
            return load_data_of(recipe.model_copy(update={"data": data}), tokenizer, is_seq2seq)

        found = rows_in(read(drawn.drawn, max_examples=None, max_eval_examples=None), is_seq2seq)
        top = read(drawn.longest, holdout=0, max_examples=None)
    share = drawn.rows / min(drawn.rows, sampling.SAMPLE)
    return dataclasses.replace(
        found, data=None, top=Part(top.train_rows), train=shared(found.train, share, recipe.data.max_examples),
        held=shared(found.held, share, recipe.data.max_eval_examples), data_bytes=round(share * found.data_bytes),
    )  # fmt: skip


def shared(part: Part, share: float, most: int | None) -> Part:
    """Rows of a sample, which stand for as many as there are, at most `most`."""
    size = max(len(part.rows), 1)
    return dataclasses.replace(part, share=min(share, share if most is None else most / size))


def rows_in(data: RunData, is_seq2seq: bool) -> Rows:
    """A run's data as rows."""
    held = Part(() if data.held_out_rows is None else data.held_out_rows)
    first = (held.rows[i]["labels"][:2] for i in range(min(len(held.rows), LOOKED_AT)))
    prompts = len(held.rows) > 0 and (is_seq2seq or any(labels == [IGNORE_INDEX] * 2 for labels in first))
    tables = [data.train, data.held_out, data.train_rows, data.held_out_rows]
    size = sum({id(t.data): t.data.nbytes for t in tables if t is not None}.values())  # both parts are of one table
    return Rows(Part(data.train_rows), data.collator, held, data.format.name, prompts, data, data_bytes=size)


def rows_given(count: int, length: int) -> Rows:
    """So many rows of one length, all labelled, where there is no data.

    Raises:
        PlanError: numbers below 1, or so large that they are none of a run.
    """
    for name, value, most in (("rows", count, MOST_ROWS), ("length", length, MOST_TOKENS)):
        if not 1 <= value <= most:
            raise PlanError(f"{name}={value}: expected at least 1 and at most {most:,}")
    row, kept = {"input_ids": [3] * length, "labels": [3] * length}, min(count, KEPT)
    return Rows(Part([row] * kept, count / kept), stacked)


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
    training = recipe.training
    if training.packing:
        top, lengths = rows.longest(1), rows.train.lengths
        if (most := len(top[0]["input_ids"])) > training.tokens:
            raise PlanError(
                f"an example has {most} tokens, more than training.tokens={training.tokens}: raise it, or cut "
                "examples shorter (data.max_length)"
            )
        packs = first_fit(lengths, training.tokens, training.seed)
        chosen = max(packs, key=lambda pack: sum(lengths[i] for i in pack))
        if rows.collator is stacked:
            return stacked([rows.train.rows[i] for i in chosen])
        return tensors(rows.collator([[rows.train.rows[i] for i in chosen]]))
    size = recipe.training.batch_size or 1
    found, count = rows.longest(size * training.accumulation), size
    if rows.train.share > 1 and len(found) < min(size, rows.train.count):
        raise PlanError(f"training.batch_size={size}: of rows that are not all read, {len(found):,} a step can be planned")
    while count + size <= len(found) and sum(len(row["input_ids"]) for row in found[: count + size]) <= TOKENS:
        count += size
    return tensors(rows.collator(found[:count]))


def tensors(batch: dict[str, Any]) -> dict[str, Tensor]:
    """What of a batch goes into the model."""
    return {k: v for k, v in batch.items() if isinstance(v, Tensor)}
