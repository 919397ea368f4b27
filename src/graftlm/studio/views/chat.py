"""Chat: a base and adapters side by side on the same prompt, all in the server's mixed batches; votes are kept."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from markupsafe import escape

from .. import bases, recipes, records
from ..adapters import base_of
from ..errors import PageError
from ..index import chat_row
from ..studio import Studio, go
from ..workspace import slug
from .run import event

PACE = 0.1  # seconds between two pieces that are sent
# sampling settings as the server has them: kind, least, most, what it is without
LIMITS: dict[str, tuple[Any, float, float, str]] = {
    "temperature": (float, 0.0, 5.0, "0"), "top_p": (float, 0.01, 1.0, "1"), "top_k": (int, 1, 10**6, "–"),
    "repetition_penalty": (float, 0.1, 10.0, "1"), "presence_penalty": (float, -2.0, 2.0, "0"),
    "frequency_penalty": (float, -2.0, 2.0, "0"), "max_tokens": (int, 1, 8192, "128"), "seed": (int, 0, 2**62, "–"),
}  # fmt: skip
MOST = 200  # adapters to choose from
USUAL = {"max_tokens": 128, "temperature": 0.0}


def router(studio: Studio) -> APIRouter:
    """Routes of the page."""
    made = APIRouter(prefix="/chat")
    add_page(made, studio)
    add_answers(made, studio)
    return made


def add_page(made: APIRouter, studio: Studio) -> None:
    @made.get("")
    def chat(request: Request, adapter: str = "", name: str = "", base: str = "") -> Response:
        studio.refresh()
        found = records.read(studio.workspace.chat(name)) if name else {}
        chosen = found.get("adapters", ["", adapter] if adapter else [""])
        base = found.get("base") or (base_of(studio.workspace, adapter) if adapter else base or "graftlm-base")
        return studio.page(
            request, "chat.html", name=name, chat=found, base=base, chosen=chosen, bases=bases.known(studio.workspace),
            adapters=studio.index.runs(limit=MOST, adapters=True), most=MOST, chats=studio.index.chats(20), limits=LIMITS,
        )  # fmt: skip

    @made.post("/send")
    async def send(request: Request) -> Response:
        form = await request.form()
        prompt, chosen = str(form.get("message", "")).strip(), [str(a) for a in form.getlist("adapter")]
        if not prompt or not chosen:
            raise PageError(422, "Write something, and choose the base or an adapter.")
        base = str(form.get("base", ""))
        recipes.permit(studio.workspace, base)
        for adapter in filter(None, chosen):
            studio.workspace.run(adapter)
        name = str(form.get("name", "")) or slug(f"{time.strftime('%Y%m%d-%H%M%S')}-{prompt[:24]}")
        file = studio.workspace.chats / f"{name}.json"
        new: dict[str, Any] = {"title": prompt[:80], "turns": []}
        found = records.read(studio.workspace.chat(name)) if form.get("name") else new
        found |= {"base": base, "adapters": chosen, "system": str(form.get("system", "")).strip(), "params": limits(form)}
        found["turns"].append({"prompt": prompt, "adapters": chosen, "answers": {}})
        records.write(file, found)
        studio.index.put(chat_row(file))
        number = len(found["turns"]) - 1
        return studio.page(request, "_turn.html", name=name, number=number, turn=found["turns"][number], live=True, new=True)


def add_answers(made: APIRouter, studio: Studio) -> None:
    @made.get("/{name}/{number}/events")
    async def events(request: Request, name: str, number: int) -> Response:
        file = studio.workspace.chat(name)
        turn_of(records.read(file), number)
        return StreamingResponse(answers(studio, request, file, number), media_type="text/event-stream")

    @made.post("/{name}/{number}/vote")
    async def vote(request: Request, name: str, number: int) -> Response:
        file = studio.workspace.chat(name)
        found = records.read(file)
        turn = turn_of(found, number)
        wanted = str((await request.form()).get("answer", ""))
        if wanted not in turn["answers"]:
            raise PageError(422, "There is no such answer.")
        turn["vote"] = label(wanted)
        records.write(file, found)
        studio.index.put(chat_row(file))
        return studio.page(request, "_turn.html", name=name, number=number, turn=turn, live=False)

    @made.post("/{name}/rows")
    async def rows(name: str) -> Response:
        return go(f"/data/{await asyncio.to_thread(as_rows, studio, name)}")

    @made.post("/stop")
    async def stop() -> Response:
        await studio.server.end()
        return Response(status_code=204)


def label(adapter: str) -> str:
    """What an answer's column is called."""
    return adapter or "base"


def limits(form: Any) -> dict[str, Any]:
    """Sampling settings of a form; PageError for one that is out of its limits."""
    found = {}
    for key, (kind, low, high, _) in LIMITS.items():
        text = str(form.get(key, "")).strip()
        if not text:
            continue
        try:
            value = kind(text)
        except ValueError as error:
            raise PageError(422, "{key}: expected a number, got {text!r}.", key=key, text=text) from error
        if not low <= value <= high:
            raise PageError(422, "{key}: expected {low} to {high}, got {text}.", key=key, low=low, high=high, text=text)
        found[key] = value
    return USUAL | found


def turn_of(chat: dict[str, Any], number: int) -> dict[str, Any]:
    if not 0 <= number < len(chat.get("turns", ())):
        raise PageError(404, "There is no such message.")
    return chat["turns"][number]


def conversation(chat: dict[str, Any], adapter: str, number: int) -> list[dict[str, str]]:
    """What an adapter is given: earlier messages with its own answers, and the last message."""
    found = [{"role": "system", "content": chat["system"]}] if chat.get("system") else []
    for turn in chat["turns"][:number]:
        answer = turn["answers"].get(adapter)
        if answer is not None:
            found += [{"role": "user", "content": turn["prompt"]}, {"role": "assistant", "content": answer}]
    return [*found, {"role": "user", "content": chat["turns"][number]["prompt"]}]


async def answers(studio: Studio, request: Request, file: Path, number: int) -> AsyncIterator[bytes]:
    """All answers of a turn at the same time, each as its text so far; the turn with its votes at the end."""
    chat = records.read(file)
    turn = chat["turns"][number]
    texts: dict[str, str] = dict(turn["answers"])
    wrong: dict[str, str] = {}

    async def write(adapter: str) -> None:
        try:
            async for piece in studio.server.write(adapter, conversation(chat, adapter, number), **chat["params"]):
                texts[adapter] = texts.get(adapter, "") + piece
        except PageError as error:
            wrong[adapter] = str(error)
        else:
            texts.setdefault(adapter, "")

    left = [a for a in turn["adapters"] if a not in texts]
    tasks: list[asyncio.Task] = []
    try:
        if left:
            starting = asyncio.create_task(studio.server.use(chat["base"]))
            while not starting.done():
                yield b": the base is loaded\n\n"
                await asyncio.wait([starting], timeout=5)
            try:
                await starting
            except PageError as error:
                wrong |= {a: str(error) for a in left}
                left = []
        tasks = [asyncio.create_task(write(a)) for a in left]
        sent: dict[str, str] = {}
        while any(not t.done() for t in tasks):
            await asyncio.wait(tasks, timeout=PACE)
            for i, adapter in enumerate(turn["adapters"]):
                if texts.get(adapter, "") != sent.get(adapter, ""):
                    sent[adapter] = texts[adapter]
                    yield event(f"answer-{i}", str(escape(texts[adapter])))
        for task in tasks:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        keep(file, number, texts, wrong)
    done = records.read(file)["turns"][number]
    yield event("turn", studio.text(request, "_turn_body.html", name=file.stem, number=number, turn=done, live=False))
    yield event("end", "")


def keep(file: Path, number: int, texts: dict[str, str], wrong: dict[str, str]) -> None:
    """Write answers down, also those that were cut short."""
    found = records.read(file)
    found["turns"][number] |= {"answers": texts, "wrong": wrong}
    records.write(file, found)


def as_rows(studio: Studio, name: str) -> str:
    """A conversation as a training row in data/: of each turn the answer that was voted for, else the only one."""
    found = records.read(studio.workspace.chat(name))
    learnt = [{"role": "system", "content": found["system"]}] if found.get("system") else []
    begin = len(learnt)
    for turn in found["turns"]:
        best = turn.get("vote")
        kept = [a for a in turn["answers"] if (label(a) == best if best else len(turn["answers"]) == 1)]
        if kept:
            answer = {"role": "assistant", "content": turn["answers"][kept[0]]}
            learnt += [{"role": "user", "content": turn["prompt"]}, answer]
    if len(learnt) == begin:
        raise PageError(422, "Vote for an answer of each message that should be learnt from.")
    path = studio.workspace.new_file(f"{name}.jsonl")
    path.write_text(json.dumps({"messages": learnt}, ensure_ascii=False) + "\n", encoding="utf-8")
    studio.index.sync()
    return path.name
