"""`graftlm train`: an adapter from a recipe file, from flags, or from both (flags win)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import processes
from ..errors import ConfigError
from . import _base, say

if TYPE_CHECKING:
    from ..training import Recipe, RunResult

# flag -> where it stands in a recipe; what a flag leaves out is the recipe's default
FLAGS = {
    "base": "base", "quantization": "quantization", "data": "data.source", "data_format": "data.format", "method": "method",
    "epochs": "training.epochs", "steps": "training.max_steps", "lr": "training.learning_rate",
    "budget": "training.budget", "batch_size": "training.batch_size", "max_length": "data.max_length",
    "strategy": "training.strategy", "seed": "training.seed", "init_from": "init_from", "output": "output_dir",
}  # fmt: skip


def train(
    recipes: Annotated[
        list[Path] | None,
        typer.Argument(help="Recipe (YAML). Without one: flags over the defaults. Several train together over one base."),
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option("--override", "--set", help="key=value of the recipe: training.epochs=3. Repeatable.")
    ] = None,
    base: Annotated[str | None, typer.Option(help=_base.BASE_HELP)] = None,
    quantization: Annotated[str | None, typer.Option(help="Hold the base in int8, nf4 or fp4 (none: as it is).")] = None,
    data: Annotated[str | None, typer.Option(help="Data: a bundled name, a file, a folder or a hub id.")] = None,
    data_format: Annotated[str | None, typer.Option("--format", help="How an example becomes text.")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="lora, prompt-tuning, prefix-tuning, … (docs/recipes.md has all); lora-int8, qlora: over int8, nf4."
        ),
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, in place of epochs.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate; without it by method and width of the base.")] = None,
    budget: Annotated[
        str | None, typer.Option(help="Search the learning rate first, for so long: 90s, 2m. Default: no search.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a step.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest example, in tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    init_from: Annotated[str | None, typer.Option(help="Adapter directory to train further.")] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Directory for the adapter.")] = None,
    processes_wanted: Annotated[
        int | None,
        typer.Option("--processes", help="Train in so many processes of this machine, each on batch_size rows a step."),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            help="Of several processes: each holds all (ddp), part of the base (fsdp2), of AdamW (zero2) or of both (zero3)."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last complete checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in the output directory.")] = False,
    no_plan: Annotated[bool, typer.Option("--no-plan", help="No plan of memory and time before it begins.")] = False,
    show: Annotated[bool, typer.Option("--show-recipe", help="Print the recipe with all defaults, and stop.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    progress: Annotated[
        bool, typer.Option("--progress", help="Write progress.jsonl into the output directory, for programs that watch.")
    ] = False,
) -> None:
    """Train an adapter and measure it before and after.

    Ctrl-C ends the running step, saves the adapter and a checkpoint; --resume goes on from there.

    Several recipes share every pass over one frozen base, and each adapter comes out as if it were trained alone. A run that
    fails ends alone; the exit code is then 1.

    On several GPUs: --processes N; on several machines torchrun … -m graftlm train … (docs/distributed.md).
    """
    given = locals()
    from rich.console import Console

    _base.quiet_libraries()
    from ..planning.watching import memory_watched
    from ..training import TrainingInterrupted, run

    flags = {key: given[flag] for flag, key in FLAGS.items() if given[flag] is not None}
    flags |= {name: True for name in ("resume", "overwrite") if given[name]}
    if budget is not None:
        if lr is not None:
            raise ConfigError(f"--budget searches the learning rate, and --lr {lr:g} names it; leave one out.")
        flags["training.learning_rate"] = "search"
    console = Console(quiet=not processes.is_first())
    built = [build_recipe(path, flags, override or []) for path in recipes or [None]]  # type: ignore[list-item]
    if show:
        console.print("---\n".join(r.to_yaml() for r in built), end="", highlight=False, markup=False)
        return
    if processes_wanted is not None:
        from ._processes import launch

        planned_before(built, quiet or no_plan, f"Each of {processes_wanted} processes: ")
        raise typer.Exit(launch(built, processes_wanted, quiet=quiet, progress=progress))
    if len(built) > 1:
        several(console, built, quiet, no_plan, progress)
        return
    chosen = built[0]
    planned, loaded = planned_before(built, quiet or no_plan or processes.count() > 1)
    try:
        with _base.notices_on_stderr(), memory_watched(planned, chosen.output_dir):
            result = run(chosen, quiet=quiet, data=loaded, progress=progress)
    except TrainingInterrupted:
        folder = chosen.output_dir
        console.print(f"Stopped. The adapter so far is in {folder}; go on with --resume and the same recipe.", markup=False)
        raise typer.Exit(130) from None
    report(console, chosen, result)
    processes.leave()


def planned_before(recipes: list[Recipe], without: bool, before: str = "") -> tuple[Any, Any]:
    """The plan of a run, said in a line, and its data; None for both without a plan."""
    if without:
        return None, None
    from ..planning.watching import ahead

    with _base.notices_on_stderr():
        return ahead(recipes, lambda text: say(before + text))


def several(console: Any, recipes: list[Recipe], quiet: bool, no_plan: bool, progress: bool) -> None:
    """Runs that train together.

    Raises:
        Exit: code 1 if one failed, 130 after Ctrl-C.
    """
    from ..planning.watching import exhausted, explained, memory_watched
    from ..training import TrainingInterrupted, train_together

    planned, _ = planned_before(recipes, quiet or no_plan or processes.count() > 1)
    try:
        with _base.notices_on_stderr(), memory_watched(planned, ", ".join(r.output_dir for r in recipes)):
            outcomes = train_together(recipes, quiet=quiet, progress=progress)
    except TrainingInterrupted as stopped:
        console.print(f"{stopped} (--resume)", markup=False)
        raise typer.Exit(130) from None
    for outcome in outcomes:
        if outcome.result is not None:
            report(console, outcome.recipe, outcome.result)
            console.print()
    failed = [(o.recipe.output_dir, o.error) for o in outcomes if o.error is not None]
    for folder, error in failed:
        text = explained(planned, folder, error) if exhausted(error) else error
        console.print(f"{folder}: {text}", style="red", markup=False, highlight=False)
    if failed:
        raise typer.Exit(1)
    processes.leave()


def build_recipe(path: Path | None, flags: dict[str, Any], overrides: list[str]) -> Recipe:
    """The recipe of a file (or of the defaults), flags and `key=value` texts put over it in this order."""
    import json

    from ..training import Recipe

    texts = [f"{key}={json.dumps(value)}" for key, value in flags.items()] + overrides
    return Recipe.from_dict({}, texts, "the flags") if path is None else Recipe.from_yaml(path, texts)


def report(console: Any, recipe: Recipe, result: RunResult) -> None:
    """What the training changed, as a table with a few samples."""
    from rich.table import Table

    m = result.metrics
    over = f" over {m['quantization']}" if m["quantization"] else ""
    table = Table(title=f"{recipe.method}{over} on {recipe.data.source}", title_justify="left")
    for name in ("", "before", "after"):
        table.add_column(name, justify="left" if not name else "right")
    for name in ("loss", "perplexity", "accuracy"):
        if m[name] is not None:
            table.add_row(f"held-out {name}", _base.shown(name, m[f"{name}_before"]), _base.shown(name, m[name]))
    console.print(table)
    console.print(
        f"{m['trainable_parameters']:,} trainable parameters, {m['file_bytes']:,} bytes, {m['seconds']:.1f} s, "
        f"{m['tokens_per_second']:.0f} tokens/s, base {m['base_bytes'] / 2**20:.1f} MiB, peak memory "
        f"{m['peak_memory_bytes'] / 2**20:.0f} MiB",
        highlight=False,
    )
    for sample in result.samples[:3]:
        console.print(f"\n{sample['prompt'].strip()}", style="dim", markup=False, highlight=False)
        for name in ("before", "after"):
            console.print(f"  {name}: {sample[name].strip()}", markup=False, highlight=False)
    if m.get("note"):
        console.print(f"\n{m['note']}", style="yellow", markup=False, highlight=False)
    console.print(f"\nSaved in {result.output_dir}", markup=False, highlight=False)
