"""`graftlm evaluate`: loss, perplexity and accuracy of a base model and of adapters on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import _base


def evaluate(
    adapter: Annotated[list[Path] | None, typer.Option(help="Adapter directory. Repeatable.")] = None,
    base: _base.BaseOption = None,
    quantization: _base.QuantizationOption = None,
    data: Annotated[str | None, typer.Option(help="Data: a bundled name, a file, a folder or a hub id.")] = None,
    split: Annotated[str | None, typer.Option(help="Split or slice to evaluate on.")] = None,
    data_format: Annotated[str | None, typer.Option("--format", help="How an example becomes text.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest example, in tokens.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a batch.")] = None,
    max_examples: Annotated[int | None, typer.Option(help="Evaluate on at most so many.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")] = False,
) -> None:
    """Measure the base model, and each adapter on it, on held-out data.

    Without --split the data's own test or validation split is taken, else all of it.
    """
    import json

    from rich.console import Console

    _base.quiet_libraries()
    from ..model import PeftModel
    from ..training import Recipe, measure, resolve_base
    from .train import build_recipe

    named = _base.base_for(base, {str(path): str(path) for path in adapter or []})
    values = {
        "base": named, "quantization": quantization, "data.source": data, "data.eval_split": split,
        "data.format": data_format, "data.max_length": max_length, "data.max_eval_examples": max_examples,
        "training.eval_batch_size": batch_size,
    }  # fmt: skip
    recipe: Recipe = build_recipe(None, {k: v for k, v in values.items() if v is not None}, [])
    recipe = recipe.replace(f"data.eval_split={json.dumps(split or own_split(recipe))}")
    model, tokenizer = resolve_base(recipe.base, dtype=recipe.dtype, quantization=recipe.quantization)
    rows: dict[str, dict[str, Any]] = {"base": metrics(measure(recipe, model, tokenizer))}
    for path in adapter or []:
        with _base.notices_on_stderr():
            wrapped = PeftModel.from_pretrained(model, path)
        rows[str(path)] = metrics(measure(recipe, wrapped, tokenizer))
        wrapped.unload()
    if json_output:
        typer.echo(json.dumps(rows, indent=1, ensure_ascii=False))
    else:
        form = f" ({recipe.quantization})" if recipe.quantization else ""
        Console().print(table_of(rows, f"{recipe.base}{form} on {recipe.data.source}, {recipe.data.eval_split}"))


def own_split(recipe: Any) -> str:
    """The split to evaluate on where none was named."""
    from ..data import load_data

    have = load_data(recipe.data.source, name=recipe.data.name)
    return next((name for name in ("test", "validation") if name in have), next(iter(have)))


def metrics(found: Any) -> dict[str, Any]:
    return {name: found.metrics[name] for name in ("loss", "perplexity", "accuracy", "examples")}


def table_of(rows: dict[str, dict[str, Any]], title: str) -> Any:
    """A rich table, a line a model; accuracy only where it was measured."""
    from rich.table import Table

    names = [n for n in ("loss", "perplexity", "accuracy") if any(r[n] is not None for r in rows.values())]
    table = Table("", title=title, title_justify="left")
    for name in names:
        table.add_column(name, justify="right")
    for label, row in rows.items():
        table.add_row(label, *(_base.shown(name, row[name]) for name in names))
    return table
