"""`graftlm chat`: a conversation with one base and its adapters."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import nearest
from . import _base

if TYPE_CHECKING:
    from ..inference import Sampling

HELP = """/adapter NAME   answer with this adapter (or NAME+NAME together); alone: list them
/base           answer without adapters
/system TEXT    instruction in front of the conversation; alone: remove it
/reset          forget the conversation
/help           this list
/quit           leave (also Ctrl-D)"""


@dataclass
class Session:
    """A conversation's state. `active` holds names of adapters; empty for the plain base."""

    model: Any
    tokenizer: Any
    sampling: Sampling
    names: list[str]
    active: list[str] = field(default_factory=list)
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    @property
    def title(self) -> str:
        return " + ".join(self.active) or "base"

    def messages(self) -> list[dict[str, str]]:
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns


def chat(
    base: _base.BaseOption = None,
    adapter: _base.AdapterOption = None,
    quantization: _base.QuantizationOption = None,
    system: Annotated[str | None, typer.Option(help="Instruction in front of the conversation.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this probability.")] = 0.95,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 avoids repetition.")] = 1.1,
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer. May be repeated.")] = None,
) -> None:
    """Talk to a model; switch adapters while talking.

    /adapter NAME switches, /base takes all off, /reset forgets the conversation, /quit leaves. Ctrl-C stops an answer.
    """
    from ..inference import Sampling

    sampling = Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, repetition_penalty=repetition_penalty,
        seed=seed, stop=tuple(stop or ()),
    )  # fmt: skip
    adapters = _base.named_adapters(adapter)
    model, tokenizer = _base.load_base(_base.base_for(base, adapters), quantization)
    model = _base.attach(model, adapters)
    session = Session(model, tokenizer, sampling, list(adapters), list(adapters)[:1], system)
    say(f"Adapters: {', '.join(adapters) or 'none'}. Answering: {session.title}. /help lists the commands.")
    with _base.ready_to_generate(model):
        while (line := ask(session)) is not None:
            if line.startswith("/"):
                if not command(session, line):
                    break
            elif line:
                answer(session, line)


def say(text: str) -> None:
    """A line about the conversation, apart from it."""
    _base.console(stderr=True).print(text, style="dim", markup=False)


def ask(session: Session) -> str | None:
    """The user's next line, stripped; None at the end of input."""
    prompt = f"[{session.title}] > " if sys.stdin.isatty() else ""
    try:
        return input(prompt).strip()
    except EOFError:
        return None


def command(session: Session, line: str) -> bool:
    """Run a line that starts with '/'. False: leave."""
    word, _, rest = line[1:].partition(" ")
    rest = rest.strip()
    if word in ("quit", "exit", "q"):
        return False
    if word == "adapter":
        switch(session, rest)
    elif word == "base":
        session.active = []
        say("Answering: base.")
    elif word == "system":
        session.system = rest or None
        say("Instruction set." if rest else "Instruction removed.")
    elif word == "reset":
        session.turns.clear()
        say("The conversation is forgotten.")
    elif word == "help":
        say(HELP)
    else:
        say(f"There is no command /{word}{nearest(word, ['adapter', 'base', 'system', 'reset', 'help', 'quit'])}\n{HELP}")
    return True


def switch(session: Session, wanted: str) -> None:
    """Make one adapter, or several joined by '+', answer from now on."""
    names = [n.strip() for n in wanted.split("+") if n.strip()]
    unknown = [n for n in names if n not in session.names]
    if unknown or not names:
        have = ", ".join(session.names) or "none (start with --adapter DIRECTORY)"
        hint = f"There is no adapter {unknown[0]!r}{nearest(unknown[0], session.names)} " if unknown else ""
        say(f"{hint}Adapters: {have}. Answering: {session.title}.")
        return
    session.active = names
    say(f"Answering: {session.title}.")


def answer(session: Session, line: str) -> None:
    """One turn: the user's line, and the model's answer as it comes. An interrupted answer is not kept."""
    session.turns.append({"role": "user", "content": line})
    try:
        text = reply(session)
    except KeyboardInterrupt:
        typer.echo()
        say("Stopped; this turn is forgotten.")
        session.turns.pop()
        return
    session.turns.append({"role": "assistant", "content": text})


def reply(session: Session) -> str:
    """The model's next turn, streamed to the terminal."""
    import dataclasses

    from ..inference import complete

    prompt, templated = fitting_prompt(session)
    sampling = session.sampling
    if not templated:
        sampling = dataclasses.replace(sampling, stop=(*sampling.stop, "Human:"))
    streamer = None
    if sys.stdout.isatty():
        from transformers import TextStreamer

        streamer = TextStreamer(session.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with activated(session):
        (text,) = complete(session.model, session.tokenizer, [prompt], sampling, streamer=streamer)
    if streamer is None:
        typer.echo(text.strip())
    return text.strip()


def activated(session: Session) -> Any:
    """The context under which the chosen adapters answer."""
    from contextlib import nullcontext

    if not session.names:
        return nullcontext()
    if not session.active:
        return session.model.disable_adapter()
    session.model.set_adapter(list(session.active), inference_mode=True)
    return nullcontext()


def fitting_prompt(session: Session) -> tuple[list[int], bool]:
    """The conversation as token ids, and whether a template of the tokenizer made it.

    The oldest turns are forgotten when the model's context would overflow.
    """
    from ..data import chat_prompt_ids

    templated = bool(session.tokenizer.chat_template)
    config = session.model.config
    length = next((v for k in ("max_position_embeddings", "n_positions") if (v := getattr(config, k, None))), None)
    limit = min(length or 10**9, session.tokenizer.model_max_length or 10**9) - session.sampling.max_new_tokens
    while True:
        prompt = chat_prompt_ids(session.messages(), session.tokenizer)
        if len(prompt) <= limit or len(session.turns) < 3:
            return prompt, templated
        del session.turns[:2]
        say("The conversation is longer than the model's context; its oldest turn is forgotten.")
