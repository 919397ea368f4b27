"""`graftlm demo`: the comparison on what is bundled, and before and after."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _base
from .compare import finish

if TYPE_CHECKING:
    from ..comparison import ComparisonResult

DATA = "tweets"
# Epochs by measurement (docs/dev-log.md); the learning rates are the recipes' own for the bundled base.
SETTINGS: dict[str, Any] = {
    "training": {"epochs": 18, "batch_size": 4, "eval_batch_size": 50, "eval_strategy": "steps", "interval": 117}
}
SHOWN = 4  # held-out tweets


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of adapters and report.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the results.")] = False,
) -> None:
    """Fine-tune the bundled model with every method and show before and after (minutes).

    Needs no network: model and data (50 labelled tweets to train on, 200 held out) are in the package.
    """
    _base.quiet_libraries()
    from .. import comparison

    with _base.notices_on_stderr():
        result = comparison.compare(
            base=_base.DEFAULT_BASE, data=DATA, output_dir=output, overwrite=True, seeds=[seed], settings=SETTINGS,
            quiet=quiet, command=f"graftlm demo --seed {seed}",
        )  # fmt: skip
    before_and_after(result)
    finish(result)


def before_and_after(result: ComparisonResult) -> None:
    """A few held-out tweets: the base's text, and every method's."""
    from rich.table import Table
    from rich.text import Text

    runs = [r for r in result.runs if r.samples]
    out = _base.console()
    for i, sample in enumerate(runs[0].samples[:SHOWN] if runs else ()):
        out.print(Text(str(sample["prompt"]).strip(), style="bold"))
        table = Table(box=None, show_header=False, padding=(0, 1))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        target = str(sample["target"]).strip()
        table.add_row("right answer", target)
        table.add_row("base, before", Text(first_line(sample["before"]), style="red"))
        for run in runs:
            if i < len(run.samples):
                text = str(run.samples[i]["after"]).strip()
                table.add_row(run.label, Text(first_line(text), style="green" if text == target else "red"))
        out.print(table)
        out.print()


def first_line(text: Any) -> str:
    """The beginning of a generation, on one line."""
    line = " ".join(str(text).split())
    return (line[:100] + "…" if len(line) > 100 else line) or "(nothing)"
