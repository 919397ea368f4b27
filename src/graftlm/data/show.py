"""A random look into a data set: raw rows as a table, prepared rows as decoded tokens.

In prepared rows the labelled tokens are green and stand in ⟦brackets⟧ (so they can be told without colour),
masked ones are dim, and padding is counted: ``<pad>×12``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

from graftlm.data._pair import IGNORE_INDEX
from graftlm.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from rich.console import RenderableType
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

LABELLED, MASKED, PADDING = "bold green", "dim", "dim italic"


def show(
    dataset: Dataset | DatasetDict,
    tokenizer: PreTrainedTokenizerBase | None = None,
    n: int = 3,
    seed: int = 0,
) -> RenderableType:
    """``n`` random rows (all where there are fewer) of each split, for ``rich.print``.

    ``tokenizer`` decodes prepared data (columns ``input_ids`` and ``labels``) and is needed only for it;
    raw data is shown as a table, with the names of classes in place of their numbers. The same ``seed``
    picks the same rows.
    """
    from rich.console import Group

    if n < 1:
        raise DataError(f"n={n}; expected at least one row to show")
    if isinstance(dataset, dict):
        return Group(*(_show(part, tokenizer, n, seed, f"{name}: ") for name, part in dataset.items()))
    return _show(dataset, tokenizer, n, seed, "")


def _show(dataset: Dataset, tokenizer: Any, n: int, seed: int, title: str) -> RenderableType:
    from rich.console import Group
    from rich.panel import Panel

    picks = sorted(random.Random(seed).sample(range(len(dataset)), min(n, len(dataset))))
    title += f"{len(picks)} of {len(dataset)} rows"
    if "input_ids" not in dataset.column_names:
        return _table(dataset, picks, title)
    if tokenizer is None:
        raise DataError("prepared data is shown as decoded tokens: pass the tokenizer, show(dataset, tokenizer)")
    panels = [Panel(tokens_as_text(dataset[i], tokenizer), title=f"row {i}", title_align="left") for i in picks]
    return Group(title, *panels)


def _table(dataset: Dataset, picks: list[int], title: str) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", show_lines=True)
    table.add_column("row", justify="right", style="dim")
    for column in dataset.column_names:
        table.add_column(Text(column), overflow="fold")
    for i in picks:
        row = dataset[i]
        cells = [Text(_cell(row[c], dataset.features[c])) for c in dataset.column_names]
        table.add_row(str(i), *cells)
    return table


def _cell(value: Any, feature: Any) -> str:
    """A value as text; class numbers, alone or in a list, by name."""
    if isinstance(value, list):
        inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) else None)
        return ", ".join(_cell(item, inner) for item in value)
    if isinstance(value, int) and hasattr(feature, "int2str"):
        return str(feature.int2str(value)) if value >= 0 else "(none)"
    if isinstance(value, Mapping) and {"role", "content"} <= value.keys():
        return f"{value['role']}: {value['content']}"
    return str(value)


def tokens_as_text(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Text:
    """One prepared row as rich text; encoder-decoder rows show the answer on a line of its own."""
    from rich.text import Text

    ids, labels = list(row["input_ids"]), row.get("labels")
    mask = row.get("attention_mask") or [1] * len(ids)
    text = Text()
    causal = labels is not None and len(labels) == len(ids) and _agree(ids, labels)
    states = _states(ids, labels if causal else None, mask)
    for state, run in groupby(zip(states, ids, strict=True), key=lambda pair: pair[0]):
        text.append_text(_run(state, [token for _, token in run], tokenizer))
    if labels is not None and not causal:
        text.append("\n")
        kept = [token for token in labels if token != IGNORE_INDEX]
        text.append_text(_run(LABELLED, kept, tokenizer))
    return text


def _agree(ids: list[int], labels: list[int]) -> bool:
    return all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True))


def _states(ids: list[int], labels: list[int] | None, mask: list[int]) -> Iterator[str]:
    for i in range(len(ids)):
        if not mask[i]:
            yield PADDING
        else:
            yield LABELLED if labels is not None and labels[i] != IGNORE_INDEX else MASKED


def _run(state: str, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Text:
    """Neighbouring tokens of one kind."""
    from rich.text import Text

    if state == PADDING:
        return Text(f"{tokenizer.convert_ids_to_tokens(ids[0])}×{len(ids)}", style=state)
    decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Text(f"⟦{decoded}⟧" if state == LABELLED else str(decoded), style=state)
