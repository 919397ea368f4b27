"""Collators: a list of rows (dicts of int lists, lengths T_i) to a dict of tensors [B, T].

    CausalLMCollator      pads to the longest row, left or right
    FixedLengthCollator   pads to one length, as document 001 (64, left)
    LengthSortedCollator  longest row first, right-padded, as document 004
    Seq2SeqCollator       encoder-decoder: inputs and labels padded apart

They take ``input_ids``, ``attention_mask`` (ones where absent), ``labels`` and ``position_ids``; other
columns are left out unless named in ``extra``, which come back as plain lists (adapter names, for example).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from graftlm.data._pair import IGNORE_INDEX
from graftlm.data.prepare import pad_token_id
from graftlm.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

Rows = Sequence[Mapping[str, Any]]
Side = Literal["left", "right"]


@dataclass(frozen=True)
class CausalLMCollator:
    """Pads ``input_ids``, ``attention_mask``, ``labels`` (-100) and ``position_ids`` to the longest row.

    ``side`` defaults to the tokenizer's; ``pad_to_multiple_of`` rounds the length up.
    """

    tokenizer: PreTrainedTokenizerBase
    side: Side | None = None
    pad_to_multiple_of: int | None = None
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        pad_token_id(self.tokenizer)
        _check_side(self.side)

    def __call__(self, rows: Rows) -> dict[str, Any]:
        rows = _checked(rows)
        length = _round_up(max(len(row["input_ids"]) for row in rows), self.pad_to_multiple_of)
        side = self.side or self.tokenizer.padding_side
        return _batch(rows, length, side, pad_token_id(self.tokenizer)) | _extra(rows, self.extra)


@dataclass(frozen=True)
class FixedLengthCollator:
    """Every batch ``max_length`` wide; longer rows are cut at their end, DataError if all labels go."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int = 64
    side: Side = "left"
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        pad_token_id(self.tokenizer)
        _check_side(self.side)

    def __call__(self, rows: Rows) -> dict[str, Any]:
        rows = _cut(_checked(rows), self.max_length)
        return _batch(rows, self.max_length, self.side, pad_token_id(self.tokenizer)) | _extra(rows, self.extra)


@dataclass(frozen=True)
class LengthSortedCollator:
    """Rows from longest to shortest (equal ones keep their order), right-padded, cut to ``max_length``."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int = 2048
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        pad_token_id(self.tokenizer)

    def __call__(self, rows: Rows) -> dict[str, Any]:
        rows = sorted(_checked(rows), key=lambda row: -len(row["input_ids"]))
        rows = _cut(rows, self.max_length)
        length = len(rows[0]["input_ids"])
        return _batch(rows, length, "right", pad_token_id(self.tokenizer)) | _extra(rows, self.extra)


@dataclass(frozen=True)
class Seq2SeqCollator:
    """transformers' DataCollatorForSeq2Seq: encoder inputs and labels (-100) padded to their own longest.

    With ``model`` the batch also holds ``decoder_input_ids`` where the model can make them.
    """

    tokenizer: PreTrainedTokenizerBase
    model: Any = None
    pad_to_multiple_of: int | None = None
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        pad_token_id(self.tokenizer)

    def __call__(self, rows: Rows) -> dict[str, Any]:
        from transformers import DataCollatorForSeq2Seq

        rows = _checked(rows, same_length=False)
        collate = DataCollatorForSeq2Seq(self.tokenizer, model=self.model, pad_to_multiple_of=self.pad_to_multiple_of)
        keys = ("input_ids", "attention_mask", "labels")
        batch = collate([{key: list(row[key]) for key in keys if key in row} for row in rows])
        return {key: value for key, value in batch.items() if value is not None} | _extra(rows, self.extra)


def _checked(rows: Rows, *, same_length: bool = True) -> Rows:
    """Rows that can be batched: all with ``input_ids`` and the same other columns, equally long."""
    if not rows:
        raise DataError("cannot make a batch of no rows")
    keys = rows[0].keys()
    for i, row in enumerate(rows):
        if "input_ids" not in row:
            raise DataError(f"row {i} has no 'input_ids', only {sorted(row)}; tokenise the data with prepare first")
        if row.keys() != keys:
            raise DataError(f"row {i} has the columns {sorted(row)}, row 0 {sorted(keys)}; they must be the same")
        for key in ("attention_mask", "labels", "position_ids"):
            if same_length and key in row and len(row[key]) != len(row["input_ids"]):
                raise DataError(
                    f"row {i}: {len(row[key])} {key} for {len(row['input_ids'])} input_ids; they must be "
                    "equally long (for encoder-decoder rows use Seq2SeqCollator)"
                )
    return rows


def _cut(rows: Rows, max_length: int) -> Rows:
    cut = []
    for row in rows:
        if len(row["input_ids"]) <= max_length:
            cut.append(row)
            continue
        keys = ("input_ids", "attention_mask", "labels", "position_ids")
        short = {k: v[:max_length] if k in keys else v for k, v in row.items()}
        if "labels" in row and all(x == IGNORE_INDEX for x in short["labels"]):
            raise DataError(
                f"a row of {len(row['input_ids'])} tokens has no labelled token in its first {max_length}; "
                "raise max_length, or prepare the data with that max_length and truncation='prompt'"
            )
        cut.append(short)
    return cut


def _batch(rows: Rows, length: int, side: str, pad: int) -> dict[str, Tensor]:
    """Pads every known column to ``length``: tensors int64 [B, length]."""
    import torch

    fills = {"input_ids": pad, "attention_mask": 0, "labels": IGNORE_INDEX, "position_ids": 0}
    batch = {}
    for key, fill in fills.items():
        if key == "attention_mask":
            values = [list(row.get(key, [1] * len(row["input_ids"]))) for row in rows]
        elif key in rows[0]:
            values = [list(row[key]) for row in rows]
        else:
            continue
        filled = [[fill] * (length - len(v)) + v if side == "left" else v + [fill] * (length - len(v)) for v in values]
        batch[key] = torch.tensor(filled, dtype=torch.long)
    return batch


def _extra(rows: Rows, names: Sequence[str]) -> dict[str, list]:
    missing = [name for name in names if name not in rows[0]]
    if missing:
        raise DataError(f"extra columns {missing} are not in the rows, which have {sorted(rows[0])}")
    return {name: [row[name] for row in rows] for name in names}


def _check_side(side: str | None) -> None:
    if side not in (None, "left", "right"):
        raise DataError(f"side={side!r}; expected 'left' or 'right'")


def _round_up(length: int, multiple: int | None) -> int:
    return length if not multiple else -(-length // multiple) * multiple
