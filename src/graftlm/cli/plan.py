"""`graftlm plan`: what a run will take, before it is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, GraftError
from . import _base, say
from .train import build_recipe

if TYPE_CHECKING:
    from ..planning import Plan
    from ..training import Recipe


def plan(
    recipes: Annotated[
        list[Path] | None, typer.Argument(help="Recipe (YAML). Without one: the defaults. Several: trained together.")
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option("--override", "--set", help="key=value of the recipe: method=lora. Repeatable.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu (the memory that is free now), or an amount: 16GiB.")] = "auto",
    rows: Annotated[int | None, typer.Option(help="Plan for so many rows, in place of the data; with --length.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of each of these rows.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Every method, side by side.")] = False,
    largest: Annotated[str | None, typer.Option(help="The largest value that fits, of: batch_size, max_length.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All figures as JSON.")] = False,
) -> None:
    """What a run will take: parameters, bytes of files, memory by kind, steps and time, and whether it fits.

    No weights are loaded. The engine runs its own step over tensors that have shapes and no values. What the process takes
    besides is measured on this machine by a short run, once for each form of a base, and kept.
    """
    _base.quiet_libraries()
    chosen = [build_recipe(path, {}, override or []) for path in recipes or [None]]  # type: ignore[list-item]
    settings: dict[str, Any] = {"device": device, "rows": rows, "length": length, "say": say}
    out = _base.console()
    if (compare or largest) and len(chosen) > 1:
        raise ConfigError("--compare and --largest are of one recipe; give one")
    found: Any
    with _base.notices_on_stderr():
        if compare:
            found = methods_side_by_side(chosen[0], settings)
        elif largest:
            found = {"largest": largest_that_fits(chosen[0], largest, settings)}
        else:
            from ..planning import plan as planned

            found = planned(chosen, **settings)
    if as_json:
        typer.echo(json.dumps(as_numbers(found), indent=1, default=str))
    elif compare:
        show_methods(out, found)
    elif largest:
        value, made = found["largest"]
        out.print(f"{largest}: {value} is the largest that fits.\n{made.line()}", highlight=False)
    else:
        show(out, found)


def as_numbers(found: Any) -> Any:
    """Plans as dictionaries."""
    if isinstance(found, dict):
        return {k: as_numbers(v) for k, v in found.items()}
    if isinstance(found, tuple):
        return {"value": found[0], "plan": as_numbers(found[1])}
    return found.to_dict() if hasattr(found, "to_dict") else str(found)


def show(out: Any, found: Plan) -> None:
    """A plan as a table."""
    from rich.table import Table

    from ..planning.whole import duration, size

    step = found.step
    table = Table(title=f"{found.recipe.method} on {found.recipe.base}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, count in (
        ("process", found.process_bytes), ("base", step.base), ("adapter", step.adapter), ("gradients", step.gradients),
        ("optimizer", step.optimizer), ("activations kept", step.kept), ("workspace", step.workspace),
        ("allocator", step.allocator), ("loss (at another moment)", step.loss),
        ("highest while loading", found.loading_bytes), ("peak of the process", found.peak_bytes),
    ):  # fmt: skip
        table.add_row(name, size(count))
    out.print(table)
    s, r = found.sizes, found.rows
    file = size(s.adapter_tensors) if s.adapter_file is None else f"{s.adapter_file:,} bytes"
    merged = "none" if s.merged is None else size(s.merged)
    for line in (
        f"{s.trained:,} trained of {s.base:,} parameters",
        f"Files: adapter {file}, a checkpoint {size(s.checkpoint)}, merged model {merged}",
        f"{r['rows']:,} rows of at most {r['longest']} tokens (nine in ten: {r['quantile']}); {found.updates:,} updates, "
        f"at least {duration(found.seconds)}",
        f"{'Fits' if found.fits else 'Does not fit'}: {size(found.device.free_bytes)} free ({found.device.name})",
    ):  # fmt: skip
        out.print(line, highlight=False, markup=False)


def methods_side_by_side(recipe: Recipe, settings: dict[str, Any]) -> dict[str, Any]:
    """A plan for each method (those without options that they need), or the reason why there is none."""
    from ..planning import plan as planned
    from ..training.defaults import defaults_of, method_names

    found: dict[str, Any] = {}
    for name in method_names():
        if defaults_of(name).needs:
            continue
        try:
            found[name] = planned(recipe.replace(method=name, method_options={}), **settings)
        except GraftError as error:
            found[name] = error
    return found


def show_methods(out: Any, found: dict[str, Any]) -> None:
    """All methods in a table, by their memory."""
    from rich.table import Table

    from ..planning.whole import duration, size

    table = Table(title="Planned, not measured", title_justify="left")
    for name in ("method", "trained", "adapter", "activations", "peak", "at least", "fits"):
        table.add_column(name, justify="left" if name == "method" else "right")
    plans = {k: v for k, v in found.items() if hasattr(v, "step")}
    for name, p in sorted(plans.items(), key=lambda item: item[1].peak_bytes):
        table.add_row(
            name, f"{p.sizes.trained:,}", size(p.sizes.adapter_tensors), size(p.step.kept), size(p.peak_bytes),
            duration(p.seconds), "yes" if p.fits else "no",
        )  # fmt: skip
    out.print(table)
    for name, error in found.items():
        if name not in plans:
            out.print(f"{name}: {error}", style="red", markup=False)


def largest_that_fits(recipe: Recipe, name: str, settings: dict[str, Any]) -> tuple[int, Plan]:
    """The largest batch size or row length whose plan fits, and its plan.

    Raises:
        ConfigError: another name. PlanError: not even 1 fits.
    """
    from ..errors import PlanError
    from ..planning import plan as planned

    keys = {"batch_size": "training.batch_size", "max_length": "data.max_length"}
    if name not in keys:
        raise ConfigError(f"--largest {name}: expected one of {', '.join(keys)}")
    most = 4096

    def tried(value: int) -> Plan:
        own = dict(settings)
        if name == "max_length" and own["length"] is not None:
            own["length"] = value
        return planned(recipe.replace(f"{keys[name]}={value}"), **own)

    low, best, high = 0, None, 1
    while high <= most:
        made = tried(high)
        if not made.fits:
            break
        low, best, high = high, made, 2 * high
        if name == "batch_size" and low >= made.rows["rows"] or name == "max_length" and low > made.rows["longest"]:
            return low, made  # more changes nothing
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        made = tried(middle)
        low, best, high = (middle, made, high) if made.fits else (low, best, middle)
    if best is None:
        raise PlanError(f"{name}=1 does not fit: {tried(1).line()}")
    return low, best
