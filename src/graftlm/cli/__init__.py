"""The command line `graftlm`: one file a command, imported when it is called, so that `--help` is quick.

A mistake of the user (any `GraftError`) is one message on stderr and exit code 2; `--debug`, anywhere on the line, or
`GRAFTLM_DEBUG=1` shows the traceback too. Ctrl-C is exit code 130.
"""

from __future__ import annotations

import os
import sys
import time
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import processes
from ..errors import ConfigError, GraftError
from ..version import __version__

# name -> (module below this package, attribute, line in the help)
COMMANDS = {
    "demo": ("demo", "demo", "Fine-tune the bundled model with every method and show before and after (minutes)."),
    "plan": ("plan", "plan", "Memory, time and fit of a run before it is made; every method side by side."),
    "train": ("train", "train", "Train one adapter, from a YAML recipe or from flags."),
    "evaluate": ("evaluate", "evaluate", "Loss, perplexity and accuracy of a base or an adapter on held-out data."),
    "compare": ("compare", "compare", "Train every method on one data set; table, JSON and HTML report."),
    "generate": ("generate", "generate", "Complete prompts with one or several adapters, beside the base."),
    "chat": ("chat", "chat", "Talk to a model; switch adapters while talking."),
    "serve": ("serve", "serve", "Serve a base and its adapters over HTTP, as OpenAI's API."),
    "deploy": ("deploy", "deploy", "Serve over many replicas, on this machine or a Ray cluster, from a YAML file."),
    "studio": ("studio", "studio", "The same work in the browser: data, training, comparisons, chats, adapters."),
    "inspect": ("inspect", "inspect", "What is in an adapter directory, and does it fit a base?"),
    "merge": ("merge", "merge", "Fold an adapter into its base and save a plain model."),
    "convert": ("convert", "convert", "Turn an adapter of another method into LoRA, for servers that know only that."),
    "export": ("export", "export", "Write an adapter for vLLM, llama.cpp (GGUF) or Ollama."),
    "data": ("data", "app", "Look at data sets."),
    "run": ("run", "run", "Run a Python script that imports peft, with GraftLM in its place."),
}
DEBUG = "--debug"
OTHERS_WAIT = 5  # seconds


class LazyGroup(TyperGroup):
    """A group whose commands are known by name and help line, and imported when one is called."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        before = args[: args.index("--")] if "--" in args else args
        command = next((i for i, a in enumerate(before) if not a.startswith("-")), len(before))
        if before[command : command + 1] == ["run"]:  # what follows is the script's
            before = before[:command]
        if DEBUG in before:
            os.environ["GRAFTLM_DEBUG"] = "1"
            args = [a for i, a in enumerate(args) if a != DEBUG or i >= len(before)]
        if before[command : command + 1] == ["compare"]:
            args = with_ray(args)
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if processes.count() > 1 and args and args[0] in COMMANDS and args[0] not in ("train", "run"):
            raise ConfigError(
                f"graftlm {args[0]} runs in one process, and {processes.count()} were started; torchrun and accelerate "
                "launch are for graftlm train and graftlm run."
            )
        if args and args[0] in COMMANDS:
            self.commands[args[0]] = load(args[0])
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except GraftError as error:
            fail(error)
        except KeyboardInterrupt:
            if processes.is_first():
                say("Interrupted. What was finished before is kept.")
            raise SystemExit(130) from None


def with_ray(args: list[str]) -> list[str]:
    """`--ray` without an address is a cluster of this machine."""
    ends = [i for i, a in enumerate(args) if a == "--ray" and (i + 1 == len(args) or args[i + 1].startswith("-"))]
    return ["--ray=local" if i in ends else a for i, a in enumerate(args)]


def load(name: str) -> Any:
    """The click command (or group) behind a name."""
    module, attribute, line = COMMANDS[name]
    found = getattr(import_module(f"{__name__}.{module}"), attribute)
    if not isinstance(found, typer.Typer):
        single = typer.Typer(add_completion=False, rich_markup_mode="rich")
        single.command(name, context_settings=getattr(import_module(f"{__name__}.{module}"), "SETTINGS", None))(found)
        found = single
    command = typer.main.get_command(found)
    command.name = name
    return command


def say(text: str) -> None:
    """A line on stderr."""
    typer.secho(text, err=True, fg=typer.colors.YELLOW)


def fail(error: GraftError) -> None:
    """Show a mistake, and leave with exit code 2. Of several processes the first one tells what all of them found."""
    if not processes.is_first():
        time.sleep(OTHERS_WAIT)  # the launcher ends this one meanwhile, if the first has ended
        say(f"Process {processes.index()}:")
    if os.environ.get("GRAFTLM_DEBUG", "0") not in ("", "0"):
        import traceback

        traceback.print_exception(error)
    else:
        typer.secho("Error: ", err=True, fg=typer.colors.RED, bold=True, nl=False)
        typer.secho(str(error), err=True, fg=typer.colors.RED)
    raise SystemExit(2)


app = typer.Typer(
    name="graftlm",
    cls=LazyGroup,
    help="Train, compare and run small adapters on one frozen language model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"graftlm {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option(DEBUG, help="Show tracebacks; may stand anywhere on the line.")] = False,
) -> None:
    """Options of every command."""


def placeholder() -> None:
    """Stands in the list of commands until the command is imported."""


for _name, (_, _, _line) in COMMANDS.items():
    app.command(_name, help=_line)(placeholder)


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app()
