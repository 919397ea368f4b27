"""`graftlm compare`: every method on one data set, in a table, JSON and a report."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, GraftError
from . import _base, say

if TYPE_CHECKING:
    from ..comparison import ComparisonResult
    from ..planning import Plan


def compare(
    data: Annotated[str, typer.Option("--data", "-d", help="Bundled name, file, directory, or hub id.")] = "tweets",
    base: Annotated[str, typer.Option("--base", "-b", help=_base.BASE_HELP)] = _base.DEFAULT_BASE,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            help="METHOD or METHOD:OPTION=VALUE,…; may be repeated. all: seven usual ones; every: all there are.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of adapters and report.")] = Path("comparison"),
    epochs: Annotated[float | None, typer.Option(help="Passes over the data, for every method.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimiser steps, for every method.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a step.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="May be repeated: mean and deviation are shown.")] = None,
    format: Annotated[str | None, typer.Option(help="Format of the data; default: by the column names.")] = None,
    budget: Annotated[
        str | None, typer.Option(help="Time for a search of learning rates before: 90s, 10m, 1h. Default: no search.")
    ] = None,
    general: Annotated[str, typer.Option(help="General text for the forgetting; none for no measure.")] = "quotes",
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[ADDRESS]",
            help="Train on a Ray cluster, a form of the base a machine: host:port or auto; without: this machine.",
        ),
    ] = None,
    at_once: Annotated[int, typer.Option(min=1, help="Runs that train at a time; memory grows with it.")] = 8,
    split: Annotated[str | None, typer.Option(help="Rows to train on.")] = None,
    eval_split: Annotated[str | None, typer.Option(help="Rows held out.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--override", "--set", help="key=value of every recipe: training.learning_rate=1e-3.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier comparison in --output.")] = False,
    no_plan: Annotated[bool, typer.Option("--no-plan", help="No plan of memory and time before it begins.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the table at the end.")] = False,
) -> None:
    """Train several methods on one data set, all of them together; table, JSON and HTML report.

    --method all (the default) is lora, lora-int8, qlora, prompt-tuning, p-tuning, prefix-tuning and bottleneck; --method
    every is all methods of recipes that need no options of their own. Options behind either are of each method in it.

    The base is loaded once, and once more for each quantised form that a row names: lora-int8 and qlora are LoRA over an
    int8 and an NF4 base, prompt-tuning:quantization=nf4 is Prompt Tuning over NF4. Quality is measured on held-out rows,
    before and after. A method that fails has its error in its row; Ctrl-C keeps what is finished. Exit code 1 if no method
    finished.

    A method's options follow its name: lora:r=16,use_dora=true. Keys with a dot are parts of the recipe:
    prompt-tuning:training.learning_rate=0.3. Several values make a grid: lora:r=4|8|16. With --budget 10m learning rates
    are searched first, per method, by successive halving on rows taken out of the training rows.
    """
    _base.quiet_libraries()
    from .. import comparison

    settings = recipe_settings(epochs, max_steps, batch_size, set_)
    given: dict[str, Any] = {"source": data, "format": format, "split": split, "eval_split": eval_split}
    given = {k: v for k, v in given.items() if v is not None}
    planned = None
    if not (quiet or no_plan):
        planned = planned_before(base, given, method or comparison.METHODS, settings, at_once)
    from ..planning.watching import memory_watched

    with _base.notices_on_stderr(), memory_watched(planned, str(output), compared=True):
        result = comparison.compare(
            base=base, data=given, methods=method or comparison.METHODS,
            output_dir=output, overwrite=overwrite, seeds=seed or [0], settings=settings, quiet=quiet,
            command=shlex.join(["graftlm", *sys.argv[1:]]), budget=None if budget is None else time_of(budget),
            general=None if general == "none" else general, at_once=at_once, ray=ray,
        )  # fmt: skip
    explain_lacks(result, planned)
    finish(result)


def explain_lacks(result: ComparisonResult, planned: Plan | None) -> None:
    """Rows for which memory ran out say what was planned and taken, and what to change."""
    from ..planning.watching import exhausted, explained

    lacking = [run for run in result.runs if run.error and exhausted(run.error)]
    for run in lacking:
        run.error = explained(planned, str(result.output_dir), run.error or "", compared=True)
    if lacking:
        result.save()


def planned_before(base: str, data: Any, methods: Any, settings: Any, at_once: int) -> Plan | None:
    """Say what the comparison takes in a line; its plan, if there is one."""
    from ..comparison.run import layers_of
    from ..comparison.spec import merged, parse_all
    from ..planning.watching import ahead
    from ..training import Recipe

    specs = parse_all(methods)
    layers = layers_of(specs, merged({"base": base, "data": data}, settings), {})
    recipes = []
    for spec in specs:
        try:
            recipes.append(
                Recipe.from_dict(merged(layers[spec.label], {"method": spec.method, "method_options": spec.options}))
            )
        except (GraftError, ValueError, TypeError):
            continue  # its row of the table says why
    with _base.notices_on_stderr():
        return ahead(recipes, say, at_once)[0]


def time_of(text: str) -> float:
    """Seconds of `--budget`. ConfigError for what is no time above 0."""
    from ..training.schema import seconds_of

    found = seconds_of(text)
    if not isinstance(found, float) or not found:
        raise ConfigError(f"--budget {text!r}: expected a time above 0, as in 90s, 10m or 1.5h.")
    return found


def recipe_settings(
    epochs: float | None, max_steps: int | None, batch_size: int | None, paths: list[str] | None
) -> dict[str, Any]:
    """What holds for every recipe.

    Raises:
        ConfigError: an --override without '='.
    """
    from ..comparison.spec import put, read

    training = {"epochs": epochs, "max_steps": max_steps, "batch_size": batch_size}
    settings: dict[str, Any] = {"training": {k: v for k, v in training.items() if v is not None}}
    for text in paths or ():
        path, given, value = text.partition("=")
        if not given or not path:
            raise ConfigError(f"--override {text!r}: expected key=value, as in training.learning_rate=1e-3.")
        put(settings, path, read(value))
    return settings


def finish(result: ComparisonResult) -> None:
    """The table, the errors, and where the files are.

    Raises:
        KeyboardInterrupt: it was interrupted. Exit: no method finished (code 1).
    """
    from ..comparison.table import errors, rich_table

    out = _base.console()
    out.print(rich_table(result))
    for line in errors(result):
        out.print(line, style="red", markup=False)
    out.print(f"Report: {result.report_path}   JSON: {result.json_path}", markup=False, soft_wrap=True)
    if result.interrupted:
        raise KeyboardInterrupt
    if result.best is None:
        raise typer.Exit(1)
