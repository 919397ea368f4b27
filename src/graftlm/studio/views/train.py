"""The form of a run, its YAML beside it, and its plan."""

from __future__ import annotations

import asyncio
from typing import Any

import yaml
from fastapi import APIRouter, Request, Response

from .. import bases, recipes
from ..errors import PageError
from ..index import recipe_in
from ..studio import Studio, go
from .data import BUNDLED


def router(studio: Studio) -> APIRouter:
    """Routes of the page."""
    made = APIRouter(prefix="/train")
    add_page(made, studio)
    add_checks(made, studio)
    return made


def add_page(made: APIRouter, studio: Studio) -> None:
    @made.get("")
    def train(request: Request) -> Response:
        content = first(studio, dict(request.query_params))
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True) if content else ""
        return studio.page(
            request, "train.html", text=text, bases=bases.known(studio.workspace), data_sets=studio.index.data_sets(),
            bundled=BUNDLED,
        )  # fmt: skip

    @made.post("/start")
    async def start(request: Request) -> Response:
        form = await request.form()
        text, others = str(form.get("text", "")), others_in(form)
        found = await checked(studio, text, None, others)
        if found["problems"]:
            return studio.page(request, "_problems.html", problems=found["problems"])
        title = str(form.get("title", "")).strip()
        folders = await asyncio.to_thread(recipes.start, studio.workspace, studio.jobs, [*others, text], title)
        for folder in folders:
            await asyncio.to_thread(studio.index.note, folder)
        return go(f"/runs/{folders[0].name}")


def add_checks(made: APIRouter, studio: Studio) -> None:
    planning = Latest()

    @made.post("/check")
    async def check(request: Request) -> Response:
        form = await request.form()
        given = {k: str(v) for k, v in form.items() if k != "other"}
        by_form = given.get("by") != "yaml"
        found = await checked(studio, given.get("text", ""), given if by_form else None, others_in(form))
        changed = given.get("options_of") != (found["values"].get("method") or "lora")  # else what is typed into stays
        return studio.page(request, "_checked.html", by=given.get("by", "yaml"), options_changed=changed, **found)

    @made.post("/beside")
    async def beside(request: Request) -> Response:
        form = await request.form()
        text = str(form.get("text", ""))
        found = await checked(studio, text, None, others_in(form))
        return studio.page(
            request, "_beside.html", text=text, problems=found["problems"], name=recipes.name_for(recipes.content_of(text))
        )

    @made.post("/apart")
    def apart(request: Request) -> Response:
        return studio.page(request, "_replan.html")

    @made.post("/plan")
    async def plan(request: Request) -> Response:
        form = await request.form()
        texts = [str(form.get("text", "")), *others_in(form)]
        if any(recipes.outside(studio.workspace, text) for text in texts):
            return studio.page(request, "_plan.html", plan=None)
        try:
            async with planning as newest:
                found = await studio.worker.ask("plan", texts=texts) if newest() else None
        except PageError as error:
            return studio.page(request, "_plan.html", plan=None, error=error)
        return studio.page(request, "_plan.html", plan=found)


def others_in(form: Any) -> list[str]:
    """Recipes that are to train together with the one that is written."""
    return [str(text) for text in form.getlist("other")]


async def checked(studio: Studio, text: str, values: dict[str, str] | None, others: list[str]) -> dict[str, Any]:
    """What the recipe's checks say, and paths that may not be read."""
    found = await studio.worker.ask("check", values=values, text=text, others=others)
    for own in (found["yaml"], *others):
        found["problems"] += recipes.outside(studio.workspace, own)
    return found


def first(studio: Studio, asked: dict[str, str]) -> dict[str, Any]:
    """The recipe that the form begins with: of an example, of a run to repeat, or with what was asked for."""
    if "from" in asked:
        found = recipe_in(studio.workspace.run(asked["from"])) or {}
        return {k: v for k, v in found.items() if k not in recipes.OWN}
    content: dict[str, Any] = dict(recipes.EXAMPLES.get(asked.get("example", ""), {}).get("recipe", {}))
    if "data" in asked:
        content["data"] = {"source": asked["data"]}
        if asked.get("format"):
            content["data"] |= {"format": asked["format"], "columns": recipes.content_of(asked.get("columns", ""))}
    for key in ("base", "init_from"):
        if asked.get(key):
            content[key] = asked[key]
    return content


class Latest:
    """Lets one in at a time; of those that waited only the last one counts: `async with latest as newest: newest()`."""

    def __init__(self) -> None:
        self.lock, self.count = asyncio.Lock(), 0

    async def __aenter__(self) -> Any:
        self.count += 1
        own = self.count
        await self.lock.acquire()
        return lambda: own == self.count

    async def __aexit__(self, *error: object) -> None:
        self.lock.release()
