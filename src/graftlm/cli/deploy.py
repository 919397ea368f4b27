"""`graftlm deploy`: replicas behind one door, on this machine or a Ray cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import _base
from .serve import fleet_parts


def deploy(
    config: Annotated[Path, typer.Argument(help="YAML file: base, adapters, replicas, http, … (docs/fleet.md).")],
    address: Annotated[str | None, typer.Option(help="Ray cluster, host:port or auto, in place of the file's.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--override", "--set", help="key=value of the file: replicas.max=8. May be repeated.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Read the file, say what is wrong with it, and leave.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Take the running fleet down; what runs may end.")] = False,
) -> None:
    """Serve a base and its adapters on several replicas, as OpenAI's API.

    Without an address a Ray cluster is started on this machine, and the command serves until Ctrl-C or SIGTERM. With one the
    fleet stays there when the command returns; the same command with a changed file replaces the replicas one by one.
    """
    _base.quiet_libraries()
    start, kind = fleet_parts()
    changes = [*(set_ or ()), *([] if address is None else [f"address={address}"])]
    found = kind.from_yaml(config, changes)
    if check:
        typer.echo(f"{config}: {found.base_name} on {found.replicas.min} to {found.replicas.most} replicas")
        return
    if stop:
        start.stop(found)
    else:
        start.deploy(found, lambda text: typer.echo(text, err=True))
