"""From a data set of texts to one of token ids, or to prompts and reference answers."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from graftlm.data._base import Format
from graftlm.data._pair import IGNORE_INDEX
from graftlm.data._tokens import Tokens, cut
from graftlm.data.formats import get_format
from graftlm.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
D = TypeVar("D", "Dataset", "DatasetDict")


def prepare(
    dataset: D,
    tokenizer: PreTrainedTokenizerBase,
    format: str | Format | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    max_length: int | None = None,
    truncation: Literal["end", "prompt"] = "end",
    padding: Literal["max_length"] | None = None,
    padding_side: Literal["left", "right"] = "left",
    seq2seq: bool = False,
    for_generation: bool = False,
    **options: Any,
) -> D:
    """Tokenises a data set for training, or its prompts for generation. Deterministic.

    Args:
        format: name, format object, or None to guess it from the column names.
        columns: ``{role: column name}`` where the columns are not the format's usual ones.
        max_length: longest example in tokens (the prompt's length with ``for_generation``, the encoder's
            input and the answer each with ``seq2seq``); None takes the format's own.
        truncation: ``end`` cuts what is over at the end, as the documents do; ``prompt`` cuts the beginning
            of the prompt, so that the answer stays. ``chat`` knows only ``end``. Prompts for generation are
            always cut at their beginning.
        padding: ``max_length`` pads every row to that length, on ``padding_side`` (document 001: 64, left);
            by default rows keep their length and a collator pads.
        seq2seq: for encoder-decoder models: ``input_ids`` is the prompt, ``labels`` the answer.
        for_generation: only prompts, with their ``prompt`` and ``target`` texts as columns and no labels.
        options: other fields of the format, e.g. ``end="eos"``, ``prompt_text="…"``, ``classes=[…]``.

    Returns:
        The same kind of data set with columns ``input_ids``, ``attention_mask`` and ``labels`` (lists of
        ints; -100 outside the answer). Examples without a labelled token that a loss can see (the first
        position has none before it) are dropped, with a UserWarning that counts them.

    Raises:
        DataError: missing columns, unknown format or option, an unusable row, or no example left.
    """
    if truncation not in ("end", "prompt") or padding not in (None, "max_length"):
        raise DataError(
            f"got truncation={truncation!r} and padding={padding!r}; expected 'end' or 'prompt', and None or 'max_length'"
        )
    if max_length is not None:
        options["max_length"] = max_length
    parts = _splits(dataset)
    first = parts.get("train", next(iter(parts.values())))
    fmt = get_format(format, available=first.column_names, columns=columns, **options).bind(first)
    _check(fmt, tokenizer, truncation, padding, seq2seq, for_generation)
    encode = _encoder(fmt, Tokens(tokenizer), truncation, seq2seq, for_generation)
    if padding and not seq2seq:
        encode = _padded(encode, fmt.max_length, tokenizer.pad_token_id, padding_side)
    done = {}
    for name, part in parts.items():
        done[name] = _prepare_split(part, name, fmt, encode, seq2seq, for_generation)
    if isinstance(dataset, dict):
        return type(dataset)(done)
    return done[""]


def prompts_and_targets(
    dataset: Dataset,
    format: str | Format | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> tuple[list[str], list[str]]:
    """Prompt texts and reference answers for evaluation, one of each per row.

    ``tokenizer`` matters only to ``chat``, whose prompts are rendered with its template (or the plain one
    without). Raises DataError as ``prepare`` does, and for a DatasetDict (choose a split).
    """
    if isinstance(dataset, dict):
        raise DataError(f"got a DatasetDict; choose one of its splits, {list(dataset)}, for example data['test']")
    fmt = get_format(format, available=dataset.column_names, columns=columns, **options).bind(dataset)
    pairs = [_at_row(i, partial(fmt.pair, tokenizer=tokenizer), row) for i, row in enumerate(dataset)]
    return [pair.prompt for pair in pairs], [pair.target for pair in pairs]


def _splits(dataset: Any) -> dict[str, Dataset]:
    parts = dict(dataset) if isinstance(dataset, dict) else {"": dataset}
    for name, part in parts.items():
        if not hasattr(part, "column_names"):
            raise DataError(f"expected a datasets.Dataset or DatasetDict, got {type(part).__name__}; see load_data")
        if len(part) == 0:
            raise DataError(f"the data set{_split_name(name)} is empty; expected at least one row")
    if not parts:
        raise DataError("the DatasetDict has no splits")
    return parts


def _check(fmt: Format, tokenizer: Any, truncation: str, padding: Any, seq2seq: bool, for_generation: bool) -> None:
    """Combinations that cannot be done raise, before any row is touched."""
    if truncation == "prompt" and fmt.name == "chat":
        raise DataError("truncation='prompt' would cut into the chat template; use 'end', or raise max_length")
    if seq2seq and fmt.name == "text" and not for_generation:
        raise DataError("seq2seq needs a prompt and an answer; format 'text' has none. Use format='completion'")
    if padding and seq2seq:
        raise DataError("padding='max_length' is for decoder-only models; let Seq2SeqCollator pad")
    if padding:
        pad_token_id(tokenizer)


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's pad token id; DataError that says how to mend it where there is none."""
    found: int | None = tokenizer.pad_token_id
    if found is None:
        raise DataError(
            "the tokenizer has no pad token, so rows cannot be padded; set one first, usually "
            "tokenizer.pad_token = tokenizer.eos_token (padding is masked out, so this is safe)"
        )
    return found


def _encoder(
    fmt: Format, tokens: Tokens, truncation: str, seq2seq: bool, for_generation: bool
) -> Callable[[Mapping[str, Any]], Row]:
    """The function from one example to its row of token ids."""
    tokenizer = tokens.tokenizer
    keep_answer = truncation == "prompt"
    longest_input = min(fmt.max_input_length or fmt.max_length, fmt.max_length)
    longest_output = min(fmt.max_output_length or fmt.max_length, fmt.max_length)

    def generation(example: Mapping[str, Any]) -> Row:
        pair = fmt.pair(example, tokenizer)
        ids = tokens.prompt(pair, longest_input) + (tokens.suffix if seq2seq else [])
        return {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "prompt": pair.prompt,
            "target": pair.target,
        }

    def encoder_decoder(example: Mapping[str, Any]) -> Row:
        return tokens.encoder_decoder(fmt.pair(example, tokenizer), longest_input, longest_output, keep_answer)

    def causal(example: Mapping[str, Any]) -> Row:
        ids, labels = fmt.encode(example, tokens)
        ids, labels = cut(ids, labels, fmt.max_length, keep_answer=keep_answer, prefix=len(tokens.prefix))
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    return generation if for_generation else encoder_decoder if seq2seq else causal


def _padded(encode: Callable[[Mapping[str, Any]], Row], length: int, pad: int, side: str) -> Callable[..., Row]:
    fill = {"input_ids": pad, "attention_mask": 0, "labels": IGNORE_INDEX}

    def encode_and_pad(example: Mapping[str, Any]) -> Row:
        row = encode(example)
        for key in fill.keys() & row.keys():
            padding = [fill[key]] * (length - len(row[key]))
            row[key] = padding + row[key] if side == "left" else row[key] + padding
        return row

    return encode_and_pad


def _prepare_split(part: Dataset, name: str, fmt: Format, encode: Callable, seq2seq: bool, for_generation: bool) -> Dataset:
    from datasets import Features, List, Value
    from datasets.fingerprint import generate_random_fingerprint

    numbers, text = List(Value("int64")), Value("string")  # texts, whatever columns of these names hold
    kinds = Features({"input_ids": numbers, "attention_mask": numbers, "prompt": text, "target": text})
    fmt.bind(part)  # every split must have the columns
    done = part.map(
        lambda example, i: _at_row(i, encode, example),
        with_indices=True,
        features=kinds if for_generation else None,
        remove_columns=part.column_names,
        load_from_cache_file=False,
        # rows in memory are not cached: to hash tokenizer and format for a name takes longer than most small data sets
        new_fingerprint=None if part.cache_files else generate_random_fingerprint(),
        desc=f"Tokenising{_split_name(name)}",
    )
    if for_generation:
        return done
    first = 0 if seq2seq else 1
    keep = [i for i, labels in enumerate(done["labels"]) if any(x != IGNORE_INDEX for x in labels[first:])]
    if len(keep) == len(done):
        return done
    message = (
        f"{len(done) - len(keep)} of {len(done)} examples{_split_name(name)} have no labelled token "
        f"after cutting to max_length={fmt.max_length}"
    )
    advice = "raise max_length, or keep the answers with truncation='prompt'"
    if not keep:
        raise DataError(f"{message}: nothing is left to train on; {advice}")
    warnings.warn(f"{message} and were dropped; {advice}", UserWarning, stacklevel=3)
    return done.select(keep)


def _split_name(name: str) -> str:
    return f" of split {name!r}" if name else ""


def _at_row(index: int, action: Callable[[Mapping[str, Any]], Any], example: Mapping[str, Any]) -> Any:
    """What `action` makes of an example; an error names its row, and shows it: one that was shuffled has another number."""
    try:
        return action(example)
    except DataError as error:
        raise DataError(f"row {index}: {error}. The row: {textwrap.shorten(str(dict(example)), 200)}") from error
