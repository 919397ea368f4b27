"""`graftlm generate`: complete prompts with the base, one adapter, or several side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError, DataError
from ..files import decode, lines_of, parse_json, read_text
from . import _base

BASE = "base"


@dataclass(frozen=True)
class Variant:
    """One column of answers: its title, and the context under which the model gives them."""

    title: str
    under: Callable[[], AbstractContextManager]


def generate(
    prompt: Annotated[list[str] | None, typer.Argument(help="Prompts; without any they are read from stdin.")] = None,
    base: _base.BaseOption = None,
    adapter: _base.AdapterOption = None,
    quantization: _base.QuantizationOption = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="Prompts: one a line, or .jsonl with texts or objects with 'prompt'.")
    ] = None,
    compare_base: Annotated[bool, typer.Option("--compare-base", help="Show the plain base's answer too.")] = False,
    together: Annotated[
        bool, typer.Option("--together", help="All adapters active at once, instead of one after another.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest completion.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this probability.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 avoids repetition.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends a completion. May be repeated.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a prompt.")] = False,
    allow_base_mismatch: Annotated[
        bool, typer.Option("--allow-base-mismatch", help="Use adapters although they were trained on another base.")
    ] = False,
) -> None:
    """Complete prompts with one or several adapters, beside the base.

    One base is in memory; adapters are switched on it. With several, each one's answer is shown side by side.
    """
    from ..inference import Sampling, complete

    sampling = Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, repetition_penalty=repetition_penalty,
        seed=seed, stop=tuple(stop or ()),
    )  # fmt: skip
    adapters = _base.named_adapters(adapter)
    if together and len(adapters) < 2:
        raise ConfigError(f"--together composes adapters; got {len(adapters)}. Give --adapter twice or more.")
    prompts = read_prompts(prompt, prompts_file)
    model, tokenizer = _base.load_base(_base.base_for(base, adapters), quantization)
    model = _base.attach(model, adapters, allow_base_mismatch)
    chosen = variants(model, list(adapters), compare_base, together)
    streaming = len(chosen) == 1 and len(prompts) == 1 and not as_json and sys.stdout.isatty()
    answers: dict[str, list[str]] = {}
    for variant in chosen:
        streamer = prompt_and_streamer(prompts[0], tokenizer) if streaming else None
        with variant.under(), _base.ready_to_generate(model):
            answers[variant.title] = complete(
                model, tokenizer, prompts, sampling, batch_size=batch_size, streamer=streamer
            )  # fmt: skip
    if not streaming:
        present(prompts, answers, as_json)


def read_prompts(given: list[str] | None, file: Path | None) -> list[str]:
    """The prompts of the command line, of a file, or of stdin.

    Raises:
        ConfigError: several sources, or none. DataError: a file that cannot be read, or has no prompts.
    """
    if given and file:
        raise ConfigError("Prompts came both as arguments and with --prompts-file; give one of them.")
    if given:
        return list(given)
    if file is None and sys.stdin.isatty():
        raise ConfigError('No prompt. Give one ("…"), or --prompts-file, or pipe prompts in, one a line.')
    if file is None:
        bytewise = getattr(sys.stdin, "buffer", None)
        text = sys.stdin.read() if bytewise is None else decode(bytewise.read(), "stdin", DataError)
    else:
        try:
            text = read_text(file, DataError)
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error}") from error
    is_json = file is not None and file.suffix.lower() == ".jsonl"
    lines = enumerate(lines_of(text), 1)
    prompts = [from_json(line, f"{file}, line {i}") if is_json else line for i, line in lines if line.strip()]
    if not prompts:
        raise DataError(f"There are no prompts in {file or 'stdin'}: every line is empty.")
    return prompts


def from_json(line: str, where: str) -> str:
    """A line of a .jsonl file: a text, or an object with a text under 'prompt'."""
    value = parse_json(line, where, DataError)
    value = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(value, str):
        raise DataError(f"{where}: expected a text, or an object with a text under 'prompt'; got {line.strip()!r}")
    return value


def variants(model: Any, names: list[str], compare_base: bool, together: bool) -> list[Variant]:
    """The columns: the base first (when asked for, or alone), then each adapter, or all as one."""
    found = []
    if not names:
        return [Variant(BASE, nullcontext)]
    if compare_base:
        found.append(Variant(BASE, model.disable_adapter))
    for group in [names] if together else [[n] for n in names]:
        found.append(Variant(" + ".join(group), lambda group=group: activated(model, group)))  # type: ignore[misc]
    return found


def activated(model: Any, names: list[str]) -> AbstractContextManager:
    """Make adapters active; they stay so."""
    model.set_adapter(names, inference_mode=True)
    return nullcontext()


def prompt_and_streamer(prompt: str, tokenizer: Any) -> Any:
    """Write the prompt, and return what writes the tokens behind it as they come."""
    from transformers import TextStreamer

    out = _base.console()
    out.print(prompt, style="dim", end="", markup=False)
    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def present(prompts: list[str], answers: dict[str, list[str]], as_json: bool) -> None:
    """Answers as JSON lines, as plain lines (one column, not a terminal), or as a table."""
    if as_json:
        for i, prompt in enumerate(prompts):
            row = {"prompt": prompt, "answers": {title: texts[i] for title, texts in answers.items()}}
            typer.echo(json.dumps(row, ensure_ascii=False))
    elif not sys.stdout.isatty():
        for line in plain_lines(prompts, answers):
            typer.echo(line)
    else:
        _base.console().print(table(prompts, answers))


def plain_lines(prompts: list[str], answers: dict[str, list[str]]) -> Iterator[str]:
    """For pipes: the completions alone where there is one column, else titled below each prompt."""
    for i, prompt in enumerate(prompts):
        if len(answers) == 1:
            yield next(iter(answers.values()))[i]
            continue
        yield f"> {prompt}"
        yield from (f"[{title}] {texts[i]}" for title, texts in answers.items())


def table(prompts: list[str], answers: dict[str, list[str]]) -> Any:
    """Prompts down, variants across."""
    from rich.table import Table
    from rich.text import Text

    found = Table(show_lines=True, expand=len(answers) > 1)
    found.add_column("prompt", style="dim", ratio=1, overflow="fold")
    for title in answers:
        found.add_column(Text(title), ratio=1, overflow="fold")
    for i, prompt in enumerate(prompts):
        found.add_row(Text(prompt), *(Text(texts[i].strip()) for texts in answers.values()))
    return found
