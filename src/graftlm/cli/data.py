"""`graftlm data show`: a random look into a data set, with the loss mask in colour."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import ConfigError
from . import _base

app = typer.Typer(help="Look at data sets.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Look at data sets."""


@app.command()
def show(
    source: Annotated[str, typer.Argument(help="Bundled name, file, directory, or hub id.")],
    split: Annotated[str | None, typer.Option(help="A split, or a part: train[:50]. Default: every split.")] = None,
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", "-t", help="Base whose tokenizer prepares the rows.")
    ] = _base.DEFAULT_BASE,
    format: Annotated[str | None, typer.Option(help="Format; default: by the column names.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="ROLE=COLUMN, as in text=review. May be repeated.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest row in tokens.")] = None,
    rows: Annotated[int, typer.Option("--rows", "-n", help="Rows of each split.")] = 3,
    seed: Annotated[int, typer.Option(help="Another seed shows other rows.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Only the rows as they are, without tokens.")] = False,
) -> None:
    """Show random rows, and what training makes of them.

    Tokens with a loss stand in ⟦brackets⟧ and green; masked ones are dim.
    """
    _base.quiet_libraries()
    from datasets import disable_progress_bars

    from ..data import load_data, prepare, show

    disable_progress_bars()
    data = load_data(source, split=split)
    out = _base.console()
    out.print(show(data, n=rows, seed=seed))
    if raw:
        return
    prepared = prepare(data, load_tokenizer(tokenizer), format, columns=roles(column), max_length=max_length)
    out.print(show(prepared, load_tokenizer(tokenizer), n=rows, seed=seed))


def roles(values: list[str] | None) -> dict[str, str] | None:
    """`ROLE=COLUMN` as a mapping; ConfigError for anything else."""
    pairs = [value.partition("=") for value in values or ()]
    for (role, given, name), value in zip(pairs, values or (), strict=True):
        if not (role and given and name):
            raise ConfigError(f"--column {value!r}: expected ROLE=COLUMN, as in text=review.")
    return {role: name for role, _, name in pairs} or None


def load_tokenizer(base: str):  # type: ignore[no-untyped-def]
    """A base's tokenizer, without its model."""
    from transformers import AutoTokenizer

    from .. import architectures  # noqa: F401  (makes our own architectures known to transformers)
    from ..bundled import resolve

    path = resolve(base)
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"There is no tokenizer at {base!r}: {error}") from error
