"""The comparison as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import wording
from .findings import Findings, Row
from .report import ordered

if TYPE_CHECKING:
    from rich.table import Table


def rich_table(result: Findings) -> Table:
    """Quality of the base (before) and of each method (after), sizes and costs; best first, a failure in its row.

    Size is that of the base's weights in memory, and of an adapter's file.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    has = result.quality == "accuracy"
    rows = result.train_rows, result.eval_rows
    sizes = f" ({rows[0]:,} rows to train on, {rows[1]:,} held out)" if all(rows) else ""
    table = Table(
        title=f"{result.data} on {result.base}{sizes}",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=0,
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("method", overflow="fold", min_width=13)
    for title in (*(["accuracy"] if has else []), "loss", "ppl", "trained", "of base", "size", "time", "memory"):
        table.add_column(title, justify="right", overflow="fold")
    for title, measured in result.bases.items():
        table.add_row(f"{title} (before)", *base_cells(measured, has), style="dim")
    best = result.best.label if result.best else None
    for row in ordered(result):
        cells = done_cells(result, row, has) if row.done else failed_cells(row, has)
        table.add_row(Text(row.label, style="bold green" if row.label == best else ""), *cells)
    return table


def base_cells(base: Mapping[str, Any], has_accuracy: bool) -> list[str]:
    accuracy = [wording.percent(base.get("accuracy"))] if has_accuracy else []
    quality = [wording.number(base.get("loss")), wording.perplexity(base.get("perplexity"))]
    return [*accuracy, *quality, "", "", wording.size(base.get("base_bytes")), "", ""]


def done_cells(result: Findings, row: Row, has_accuracy: bool) -> list[Any]:
    trained = row.mean("trainable_parameters")
    return [
        *([wording.spread(row, "accuracy", wording.percent)] if has_accuracy else []),
        wording.spread(row, "loss"),
        wording.perplexity(row.mean("perplexity")),
        wording.count(trained),
        wording.share(trained, result.base_parameters),
        wording.size(row.mean("file_bytes")),
        wording.duration(row.mean("seconds")),
        wording.size(row.mean("peak_memory_bytes")),
    ]


def failed_cells(row: Row, has_accuracy: bool) -> list[Any]:
    from rich.text import Text

    run = next((r for r in row.runs if r.error), row.runs[0])
    return [Text(run.status, style="bold red"), *[""] * (7 if has_accuracy else 6)]


def errors(result: Findings) -> list[str]:
    """What went wrong, a text each run that failed."""
    return [f"{r.label} (seed {r.seed}) {r.status}: {r.error}" for r in result.runs if r.error]
