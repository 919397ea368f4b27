"""`graftlm run`: a script that imports `peft`, with GraftLM under that name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .. import as_peft
from ..errors import ConfigError

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}


def run(
    context: typer.Context,
    script: Annotated[str, typer.Argument(help="A Python file; with -m before it, a module.")],
    module: Annotated[bool, typer.Option("-m", help="Run a module, as python -m does.")] = False,
) -> None:
    """Run a Python script with its own arguments, unchanged: what it imports from peft is GraftLM.

    Options of graftlm stand before the script, all that follows is the script's. `python -m graftlm.as_peft script.py` does
    the same, also behind torchrun and accelerate launch.
    """
    if not module and not Path(script).is_file():
        raise ConfigError(f"There is no script {script!r}. Give a Python file, or -m and a module.")
    os.environ.setdefault("GRAFTLM_DEBUG", "1")  # mistakes in a script are shown with their traceback, as python does
    as_peft.run([*(["-m"] if module else []), script, *context.args])
