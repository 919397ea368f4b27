"""`graftlm studio`: the same work in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError

EXTRA = "pip install 'graftlm[ui]'"


def studio(
    workspace: Annotated[
        Path, typer.Option("--workspace", "-w", help="Folder of runs, data and chats; made where it is missing.")
    ] = Path("graftlm-workspace"),
    folder: Annotated[
        list[Path] | None, typer.Option(help="Folder from which data, bases and adapters may be read. May be repeated.")
    ] = None,
    port: Annotated[int, typer.Option(help="Port of 127.0.0.1 to listen at; 0 for any.")] = 8765,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Print the address, open nothing.")] = False,
    at_once: Annotated[int, typer.Option(min=1, help="Runs that may go on at a time; the others wait.")] = 1,
    upload_limit: Annotated[int, typer.Option(min=1, help="MiB of a file that is uploaded.")] = 512,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Make the index anew out of the folders, and stop.")] = False,
) -> None:
    """Work in the browser: data, training, comparisons, chats, adapters.

    Open the address that is printed; its token lets this browser in. Runs are processes of their own: they go on when the
    page is closed and when the studio ends, and are there when it is started again.
    """
    try:
        from ..studio import index, running
        from ..studio.workspace import Workspace
    except ImportError as error:
        raise ConfigError(f"The studio needs more packages ({error.name}): {EXTRA}") from error
    missing = [str(f) for f in folder or () if not f.is_dir()]
    if missing:
        raise ConfigError(f"--folder {missing[0]}: there is no such folder.")
    if rebuild:
        counts = index.Index(Workspace(workspace)).rebuild()
        typer.echo(", ".join(f"{count} {name}" for name, count in counts.items()))
        return
    running.run(
        workspace, folder or (), port=port, browser=not no_browser, at_once=at_once, max_upload=upload_limit * 2**20,
        say=typer.echo,
    )  # fmt: skip
