"""`graftlm chat`: a conversation with one base and its adapters, here or on a server."""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, nearest
from . import _base
from ._server import Server, ServerError

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
    """A conversation's state. `active` holds names of adapters; empty for the plain base.

    With a `server`, that answers: `base` is what it calls its base, and there is neither model nor tokenizer here.
    """

    model: Any
    tokenizer: Any
    sampling: Sampling
    names: list[str]
    active: list[str] = field(default_factory=list)
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)
    server: Server | None = None
    base: str = "base"

    @property
    def title(self) -> str:
        return " + ".join(self.active) or self.base

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
    server: Annotated[
        str | None, typer.Option(help="URL of an OpenAI-compatible server (graftlm serve) that answers instead.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="GRAFTLM_API_KEY", help="With --server: its key.")] = None,
) -> None:
    """Talk to a model; switch adapters while talking.

    /adapter NAME switches, /base takes all off, /reset forgets the conversation, /quit leaves. Ctrl-C stops an answer.
    """
    from ..inference import Sampling

    sampling = Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, repetition_penalty=repetition_penalty,
        seed=seed, stop=tuple(stop or ()),
    )  # fmt: skip
    if server is not None:
        talk(remote(Server(server, api_key), sampling, system, base, adapter, quantization))
        return
    adapters = _base.named_adapters(adapter)
    model, tokenizer = _base.load_base(_base.base_for(base, adapters), quantization)
    model = _base.attach(model, adapters)
    session = Session(model, tokenizer, sampling, list(adapters), list(adapters)[:1], system)
    with _base.ready_to_generate(model):
        talk(session)


def remote(server: Server, sampling: Sampling, system: str | None, *here: Any) -> Session:
    """A conversation with a server; ConfigError for options about what is loaded here."""
    if any(here):
        raise ConfigError("With --server the model is the server's: leave out --base, --adapter and --quantization, and "
                          "choose with /adapter NAME.")  # fmt: skip
    base, names = server.models()
    return Session(None, None, sampling, names, [], system, server=server, base=base)


def talk(session: Session) -> None:
    """Read lines and answer them until the end."""
    say(f"Adapters: {', '.join(session.names) or 'none'}. Answering: {session.title}. /help lists the commands.")
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
        say(f"Answering: {session.title}.")
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
    if session.server is not None:
        try:
            session.base, session.names = session.server.models()  # adapters come and go there
        except ServerError as error:
            say(str(error))
            return
    whole = wanted in session.names  # a server's names may hold a '+'
    names = [wanted] if whole else [n.strip() for n in wanted.split("+") if n.strip()]
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
    except ServerError as error:
        say(f"{error} This turn is forgotten.")
        session.turns.pop()
        return
    session.turns.append({"role": "assistant", "content": text})


def reply(session: Session) -> str:
    """The model's next turn, streamed to the terminal."""
    if session.server is not None:
        return from_server(session, session.server)
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


def from_server(session: Session, server: Server) -> str:
    """The server's next turn, streamed to the terminal; the oldest turns are forgotten where it finds them too many."""
    shown, model = sys.stdout.isatty(), "+".join(session.active) or session.base
    while True:
        pieces: list[str] = []
        try:
            with closing(server.answer(model, session.messages(), session.sampling)) as answer:  # Ctrl-C ends it there too
                for piece in answer:
                    pieces.append(piece)
                    if shown:
                        typer.echo(piece, nl=False)
            break
        except ServerError as error:
            if error.code != "context_length_exceeded" or len(session.turns) < 3 or pieces:
                raise
            forget_oldest(session)
    text = "".join(pieces).strip()
    typer.echo("" if shown else text)
    return text


def forget_oldest(session: Session) -> None:
    del session.turns[:2]
    say("The conversation is longer than the model's context; its oldest turn is forgotten.")


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
        forget_oldest(session)
