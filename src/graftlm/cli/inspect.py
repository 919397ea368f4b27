"""`graftlm inspect`: what is in an adapter directory, and does it fit a base?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _base

if TYPE_CHECKING:
    from ._adapter_files import AdapterFiles


def inspect(
    path: Annotated[str, typer.Argument(metavar="DIR", help="Adapter directory, of GraftLM or of HF PEFT.")],
    base: Annotated[str | None, typer.Option("--base", "-b", help=_base.BASE_HELP + " Checks the fit.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as one JSON object.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor, layer by layer.")] = False,
) -> None:
    """What is in an adapter directory, and does it fit this base?

    Exit code 0: readable, and it fits (where a base was given); 1: something is wrong, all of it listed.
    """
    from ._adapter_files import read_adapters

    found = read_adapters(_base.directory(path))
    fits = {str(a.folder): check_fit(a, base) for a in found} if base else {}
    if as_json:
        import json

        values = [a.as_dict() | ({"fit": fits[str(a.folder)]} if base else {}) for a in found]
        typer.echo(json.dumps(values[0] if len(values) == 1 else values, indent=2, ensure_ascii=False))
    else:
        out = _base.console()
        for adapter in found:
            show(out, adapter, tensors)
            if base:
                show_fit(out, fits[str(adapter.folder)])
    wrong = any(a.problems for a in found) or any(not f["fits"] for f in fits.values())
    if wrong:
        raise typer.Exit(1)


def check_fit(adapter: AdapterFiles, base: str) -> dict[str, Any]:
    """Whether the adapter can be attached to the base; see `_adapter_fit.fit`."""
    if adapter.problems:
        return {"base": base, "fits": False, "error": "not checked: " + "; ".join(adapter.problems)}
    from ._adapter_fit import fit

    return fit(adapter, base)


def show(out: Any, adapter: AdapterFiles, every_tensor: bool) -> None:
    """A panel of facts, the configuration, and the tensors."""
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    for label, value in adapter.facts():
        facts.add_row(label, Text(value))
    out.print(Panel(facts, title=Text(str(adapter.folder)), title_align="left", border_style="cyan"))
    if adapter.config:
        settings = Table(title="configuration", title_justify="left", box=None, show_header=False, padding=(0, 2))
        settings.add_column(style="dim")
        settings.add_column(overflow="fold")
        for key, value in adapter.settings().items():
            settings.add_row(key, Text(str(value)))
        out.print(settings)
    if adapter.tensors:
        out.print(tensor_table(adapter, every_tensor))
    for note in adapter.notes:
        out.print(f"• {note}", style="cyan", markup=False)
    for problem in adapter.problems:
        out.print(f"✗ {problem}", style="bold red", markup=False)


def tensor_table(adapter: AdapterFiles, every: bool) -> Any:
    """Key, shape, dtype and bytes; keys that differ in numbers only (the layers) in one row, unless all are asked for."""
    import re

    from rich.table import Table
    from rich.text import Text

    groups: dict[tuple[str, tuple[int, ...], str], list[int]] = {}
    for tensor in adapter.tensors:
        key = tensor.key if every else re.sub(r"\.\d+\.", ".*.", tensor.key)
        groups.setdefault((key, tensor.shape, tensor.dtype), []).append(tensor.nbytes)
    table = Table(title=f"tensors ({len(adapter.tensors)})", title_justify="left", box=None, padding=(0, 2))
    table.add_column("key", overflow="fold")
    for title in ("times", "shape", "dtype", "bytes"):
        table.add_column(title, justify="right", no_wrap=True)
    for (key, shape, dtype), sizes in groups.items():
        table.add_row(Text(key), str(len(sizes)), " x ".join(map(str, shape)) or "scalar", dtype, f"{sum(sizes):,}")
    return table


def show_fit(out: Any, fit: dict[str, Any]) -> None:
    """Fits or not, and everything that does not."""
    if fit["fits"]:
        out.print(f"✓ fits {fit['base']}: {fit['detail']}", style="bold green", markup=False)
        return
    out.print(f"✗ does not fit {fit['base']}", style="bold red", markup=False)
    for label in ("missing", "unexpected", "mismatched"):
        entries = fit.get(label, [])
        if entries:
            out.print(f"  {label} keys ({len(entries)}):", style="red")
            for entry in entries:
                out.print(f"    {entry}", style="red", markup=False)
    if fit.get("error"):
        out.print(f"  {fit['error']}", style="red", markup=False)
