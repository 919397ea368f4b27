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
    from ..planning.ranks import Ranks
    from ..training import Recipe


def plan(
    recipes: Annotated[
        list[Path] | None, typer.Argument(help="Recipe (YAML). Without one: the defaults. Several: trained together.")
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option("--override", "--set", help="key=value of the recipe: method=lora. Repeatable.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu (the memory that is free now), an amount (16GiB), or a GPU (h100, rtx4090, …).")
    ] = "auto",
    rows: Annotated[int | None, typer.Option(help="Plan for so many rows, in place of the data; with --length.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of each of these rows.")] = None,
    processes: Annotated[int | None, typer.Option(help="Plan for so many processes: memory of each of them.")] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            help="Of several processes: each holds all (ddp), part of the base (fsdp2), of AdamW (zero2) or of both (zero3)."
        ),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Every method, side by side.")] = False,
    largest: Annotated[str | None, typer.Option(help="The largest value that fits, of: batch_size, max_length.")] = None,
    picture: Annotated[
        Path | None, typer.Option(help="With --compare: trained parameters against memory, as SVG in this file.")
    ] = None,
    apply: Annotated[
        Path | None, typer.Option(help="Where it does not fit: write the recipe with the cheapest change that makes it fit.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All figures as JSON.")] = False,
) -> None:
    """What a run will take: parameters, bytes of files, memory by kind, steps and time, and whether it fits.

    No weights are loaded. The engine runs its own step over tensors that have shapes and no values. What the process takes
    besides is measured on this machine by a short run, once for each form of a base, and kept.
    """
    _base.quiet_libraries()
    flags = {"training.strategy": strategy} if strategy else {}
    chosen = [build_recipe(path, flags, override or []) for path in recipes or [None]]  # type: ignore[list-item]
    settings: dict[str, Any] = {"device": device, "rows": rows, "length": length, "say": say}
    out = _base.console()
    if (compare or largest or apply) and len(chosen) > 1:
        raise ConfigError("--compare, --largest and --apply are of one recipe; give one")
    if processes is not None and (compare or largest or apply):
        raise ConfigError("--processes is of a plain plan; leave --compare, --largest and --apply out")
    if picture is not None and not compare:
        raise ConfigError("--picture is of --compare; give both")
    if apply is not None and (compare or largest):
        raise ConfigError("--apply changes a run's recipe; leave --compare and --largest out")
    if apply is not None and apply.exists():
        raise ConfigError(f"--apply {apply}: the file is there already; name a new one")
    found: Any
    mended: list[Any] = []
    shared: Any = None
    with _base.notices_on_stderr():
        if compare:
            found = methods_side_by_side(chosen[0], settings)
        elif largest:
            found = {"largest": largest_that_fits(chosen[0], largest, settings)}
        else:
            from ..planning import plan as planned

            found = planned(chosen, **settings)
            if processes is not None:
                from ..planning.ranks import ranks

                shared = ranks(found, processes)
            elif not found.fits and len(chosen) == 1:
                from ..planning.mends import mends

                mended = mends(chosen[0], found, settings)
    if picture is not None:
        picture.write_text(drawn(found), encoding="utf-8")
    if as_json:
        changed = [{"what": m.what, "overrides": m.overrides, "plan": m.plan.to_dict()} for m in mended]
        numbers = as_numbers(found) | ({"mends": changed} if mended else {})
        numbers |= {"ranks": shared.to_dict()} if shared else {}
        typer.echo(json.dumps(numbers, indent=1, default=str))
    elif compare:
        show_methods(out, found)
    elif largest:
        value, made = found["largest"]
        enough = {"batch_size": made.rows["rows"], "max_length": made.rows["longest"]}[largest]
        told = f"{value} is the largest that fits" if value < enough else f"the data's {enough} fit, more changes nothing"
        out.print(f"{largest}: {told}.\n{made.line()}", highlight=False)
    else:
        show(out, found, shared)
        show_mends(out, mended)
    if apply is not None:
        write_mended(chosen[0], found, mended, apply)


def show_mends(out: Any, mended: list[Any]) -> None:
    """Changes with their memory and time."""
    from ..planning.whole import size

    for m in mended:
        fit = "fits" if m.plan.fits else "does not fit"
        line = f"  {m.what}: {size(m.plan.peak_bytes)}, {m.plan.time()} ({fit}): --set {' --set '.join(m.overrides)}"
        out.print(line, highlight=False, markup=False, soft_wrap=True)


def write_mended(recipe: Recipe, found: Plan, mended: list[Any], file: Path) -> None:
    """Write the recipe with the first change that makes it fit; the recipe itself where it fits.

    Raises:
        PlanError: no change makes it fit.
    """
    from ..planning.mends import fitting

    changed = recipe if found.fits else recipe.replace(*fitting(mended).overrides)
    file.write_text(changed.to_yaml(), encoding="utf-8")
    say(f"Written: {file}" + (" (unchanged: it fits)" if found.fits else ""))


def drawn(found: dict[str, Any]) -> str:
    """All methods by their trained parameters and memory, as a picture that says that it is planned."""
    from ..comparison import charts
    from ..planning.whole import size

    plans = {k: v for k, v in found.items() if hasattr(v, "step")}
    series = [
        charts.Series(name, i, [(p.sizes.trained, p.peak_bytes)], f"{name}: {size(p.peak_bytes)}, planned")
        for i, (name, p) in enumerate(plans.items())
    ]
    text = charts.scatter_chart(
        series, "Planned, not measured: memory against parameters", "trained parameters (log scale)",
        "planned peak memory", size, higher=False,
    )  # fmt: skip
    return text.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


def as_numbers(found: Any) -> Any:
    """Plans as dictionaries."""
    if isinstance(found, dict):
        return {k: as_numbers(v) for k, v in found.items()}
    if isinstance(found, tuple):
        return {"value": found[0], "plan": as_numbers(found[1])}
    return found.to_dict() if hasattr(found, "to_dict") else str(found)


def show(out: Any, found: Plan, shared: Any = None) -> None:
    """A plan as a table, and what each of several processes (`Ranks`) takes of it."""
    from rich.table import Table

    from ..planning.whole import size

    step = found.step
    table = Table(title=f"{found.recipe.method} on {found.recipe.base}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, count in (
        ("process", found.process_bytes), ("data", found.data_bytes), ("base", step.base), ("adapter", step.adapter),
        ("gradients", step.gradients), ("optimizer", step.optimizer), ("activations kept", step.kept),
        ("workspace", step.workspace),
        ("allocator", step.allocator), ("loss (at another moment)", step.loss),
        ("evaluations and samples (at another moment)", found.evaluation_bytes),
        ("highest while loading", found.loading_bytes), ("peak of the process", found.peak_bytes),
    ):  # fmt: skip
        table.add_row(name, size(count))
    out.print(table)
    s, r = found.sizes, found.rows
    file = size(s.adapter_tensors) if s.adapter_file is None else f"{s.adapter_file:,} bytes"
    merged = "none" if s.merged is None else size(s.merged)
    if s.adapter_file is None:
        out.print("The base is known by its configuration only: its weights are not here.", highlight=False)
    for line in (
        f"{s.trained:,} trained of {s.base:,} parameters",
        f"Files: adapter {file}, a checkpoint {size(s.checkpoint)}, merged model {merged}",
        f"{r['rows']:,} rows of at most {r['longest']} tokens (nine in ten: {r['quantile']}); {found.updates:,} updates, "
        f"{found.time()}",
        *([] if shared is None else in_ranks(shared)),
        f"{'Fits' if (shared or found).fits else 'Does not fit'}: {size(found.device.free_bytes)} free ({found.device.name})"
        + (": not checked on a GPU" if found.device.gpu else ""),
    ):  # fmt: skip
        out.print(line, highlight=False, markup=False)


def in_ranks(shared: Ranks) -> list[str]:
    """Memory by rank, in lines."""
    from ..planning.whole import size

    held = (
        ("base", shared.base), ("blocks of others, gathered", shared.gathered), ("adapter", shared.adapter),
        ("gradients", shared.gradients), ("optimizer", shared.optimizer), ("activations", shared.activations),
        ("exchange", shared.exchange),
    )  # fmt: skip
    return [
        f"{shared.processes} processes, {shared.strategy}: rank 0 to {shared.processes - 1}, each "
        + ", ".join(f"{name} {size(count)}" for name, count in held if count),
        f"Peak of each process {size(shared.peak_bytes)} (while loading {size(shared.loading_bytes)}); "
        f"{size(shared.exchanged_bytes)} exchanged in each of {shared.updates:,} updates",
    ]


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
    for name in ("method", "trained", "adapter", "activations", "peak", "expected", "fits"):
        table.add_column(name, justify="left" if name == "method" else "right")
    plans = {k: v for k, v in found.items() if hasattr(v, "step")}
    for name, p in sorted(plans.items(), key=lambda item: item[1].peak_bytes):
        table.add_row(
            name, f"{p.sizes.trained:,}", size(p.sizes.adapter_tensors), size(p.step.kept), size(p.peak_bytes),
            "?" if p.device.gpu else duration(p.seconds[1]), "yes" if p.fits else "no",
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
