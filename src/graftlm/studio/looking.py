"""A data set as the Data page shows it: rows, the format and its columns, tokens with the mask, lengths, problems by row."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..data import FORMATS, IGNORE_INDEX, get_format, load_data, prepare, prompts_and_targets
from ..errors import ConfigError, GraftError
from ..inference.detokenize import BROKEN, LONGEST

ROWS, SHOWN, MOST = 20, 4, 5000  # rows of the table, with tokens, that are looked at
CELL = 600  # characters
BINS = 16


def look(
    source: str, base: str, *, split: str = "", format: str = "", columns: dict[str, str] | None = None, page: int = 1
) -> dict[str, Any]:
    """What the page shows.

    Args:
        source: as a recipe's data.source.
        base: whose tokenizer makes tokens.
        columns: {role: column}, where they were corrected.
    """
    from datasets import disable_progress_bars

    disable_progress_bars()
    data = load_data(source)
    split = split if split in data else next(iter(data))
    rows = data[split]
    begin = min(max(page - 1, 0) * ROWS, max(len(rows) - 1, 0) // ROWS * ROWS)
    part = rows.select(range(begin, min(begin + ROWS, len(rows))))
    found: dict[str, Any] = {
        "splits": {name: len(inner) for name, inner in data.items()}, "split": split, "columns": rows.column_names,
        "rows": [[cell(row[c]) for c in rows.column_names] for row in part], "first": begin, "count": len(rows),
        "looked_at": min(len(rows), MOST), "format": format, "roles": columns or {},
    }  # fmt: skip
    try:
        return found | tokens(rows, base, format or None, columns or None)
    except GraftError as error:
        return found | {"error": str(error), "roles": roles_of(format) | (columns or {})}


def tokens(rows: Any, base: str, format: str | None, columns: dict[str, str] | None) -> dict[str, Any]:
    """The format, and what it makes of the rows."""
    tokenizer = tokenizer_of(base)
    rows = rows.select(range(min(len(rows), MOST)))
    fmt = get_format(format, available=rows.column_names, columns=columns).bind(rows)
    prompts, targets = prompts_and_targets(rows, fmt, tokenizer=tokenizer)
    lengths = [
        len(a) + len(b) + 1
        for a, b in zip(
            *(tokenizer(texts, add_special_tokens=False)["input_ids"] for texts in (prompts, targets)), strict=True
        )
    ]
    prepared = prepare(rows.select(range(min(SHOWN, len(rows)))), tokenizer, fmt)
    return {
        "format": fmt.name, "roles": fmt.columns(), "shown": [pieces(row, tokenizer) for row in prepared],
        "bins": histogram(lengths), "longest": max(lengths), "mean": sum(lengths) / len(lengths), "limit": fmt.max_length,
        "problems": problems(list(zip(prompts, targets, strict=True)), lengths, fmt.max_length),
    }  # fmt: skip


def roles_of(format: str) -> dict[str, str]:
    """The roles of a format's columns, with the columns' usual names; none of one that is not known."""
    if format not in FORMATS:
        return {}
    fields = [f for f in dataclasses.fields(FORMATS[format]) if f.name.endswith("_column")]
    return {f.name.removesuffix("_column"): str(f.default or "") for f in fields}


def tokenizer_of(base: str) -> Any:
    """A base's tokenizer. ConfigError: there is none."""
    from transformers import AutoTokenizer

    from .. import architectures  # noqa: F401  (makes our own architectures known to transformers)
    from ..bundled import resolve

    try:
        return AutoTokenizer.from_pretrained(resolve(base))
    except (OSError, ValueError) as error:
        raise ConfigError(f"There is no tokenizer at {base!r}: {error}") from error


def cell(value: Any) -> str:
    """A value of the table."""
    if isinstance(value, list):
        return "\n".join(cell(item) for item in value)[:CELL]
    if isinstance(value, Mapping) and {"role", "content"} <= value.keys():
        return f"{value['role']}: {value['content']}"[:CELL]
    return "" if value is None else str(value)[:CELL]


def pieces(row: Mapping[str, Any], tokenizer: Any) -> list[dict[str, Any]]:
    """Tokens of a prepared row as texts, each with whether a loss is on it. Those that only together are a character, as
    Chinese ones often are, are one text; decoded after the one before, for what stands between them."""
    found: list[dict[str, Any]] = []
    before: list[int] = []
    held: list[int] = []
    labelled = [label != IGNORE_INDEX for label in row["labels"]]
    for token, own, following in zip(row["input_ids"], labelled, [*labelled[1:], None], strict=True):
        held.append(token)
        text = decoded(before + held, tokenizer)[len(decoded(before, tokenizer)) :]
        if text.endswith(BROKEN) and following == own and len(held) < LONGEST:
            continue
        found.append({"text": text, "labelled": own})
        before, held = held, []
    return found


def decoded(tokens: list[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


def histogram(lengths: list[int]) -> list[dict[str, int]]:
    """How many rows are how long, in bins of one width."""
    width = max(1, -(-max(lengths) // BINS))
    counts = Counter((length - 1) // width for length in lengths)
    return [{"to": (i + 1) * width, "count": counts[i]} for i in range(max(counts) + 1)]


def problems(texts: list[tuple[str, str]], lengths: list[int], limit: int) -> list[dict[str, Any]]:
    """What is wrong with rows, each kind with the numbers of its rows."""
    seen: dict[tuple[str, str], int] = {}
    found: dict[str, list[int]] = {"empty": [], "long": [], "twice": []}
    for i, (pair, length) in enumerate(zip(texts, lengths, strict=True)):
        if not pair[1].strip():
            found["empty"].append(i)
        if length > limit:
            found["long"].append(i)
        if seen.setdefault(pair, i) != i:
            found["twice"].append(i)
    return [{"kind": kind, "rows": rows} for kind, rows in found.items() if rows]
