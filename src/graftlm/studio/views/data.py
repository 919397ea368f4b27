"""Data sets: uploaded or pointed to; their rows, and what training makes of them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fastapi import APIRouter, Request, Response
from starlette.datastructures import UploadFile

from .. import bases, recipes, records
from ..errors import LARGE, PageError
from ..index import DataSet
from ..studio import Studio, go
from ..workspace import slug

ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
BUNDLED = ("tweets", "prompts", "quotes", "alpaca-zh", "adgen-zh")
PIECE = 2**20
FORMATS = ("label", "text", "alpaca", "adgen", "completion", "chat")


def router(studio: Studio) -> APIRouter:
    """Routes of the pages."""
    made = APIRouter(prefix="/data")
    add_list(made, studio)
    add_one(made, studio)
    return made


def add_list(made: APIRouter, studio: Studio) -> None:
    @made.get("")
    def data(request: Request) -> Response:
        studio.index.sync()
        return studio.page(request, "data.html", sets=studio.index.data_sets(), bundled=BUNDLED, endings=ENDINGS)

    @made.post("/upload")
    async def upload(request: Request) -> Response:
        form = await request.form(max_files=1)
        file = form.get("file")
        if not isinstance(file, UploadFile) or not file.filename:
            raise PageError(400, "Choose a file first.")
        return await kept(studio, file)

    @made.post("/point")
    async def point(request: Request) -> Response:
        path = studio.workspace.path(str((await request.form()).get("path", "")).strip() or "?")
        if path.is_file() and path.suffix.lower() not in ENDINGS:
            raise PageError(
                422, "{name}: expected a folder, or a file of {endings}.", name=path.name, endings=", ".join(ENDINGS)
            )
        name = slug(path.name)
        note = studio.workspace.data / f"{name}.link.json"
        if (studio.workspace.data / name).exists() or note.exists():
            raise PageError(409, "There is a data set {name!r} already.", name=name)
        records.write(note, {"path": studio.workspace.shown(path)})
        studio.index.sync()
        return go(f"/data/{name}")


def add_one(made: APIRouter, studio: Studio) -> None:
    @made.get("/{name}")
    def one(request: Request, name: str) -> Response:
        found = source_of(studio, name)
        return studio.page(request, "data_set.html", name=name, source=found, bases=bases.known(studio.workspace),
                           formats=FORMATS, own=name not in BUNDLED)  # fmt: skip

    @made.post("/{name}/look")
    async def look(request: Request, name: str) -> Response:
        given = {k: str(v) for k, v in (await request.form()).items()}
        base = given.get("base") or "graftlm-base"
        recipes.permit(studio.workspace, base)
        shown, format = given.get("format_shown", ""), given.get("format", "")
        same = bool(shown) and format in ("", shown)  # columns that were chosen are those of the format that was shown
        format = shown if same else format
        roles = {k.removeprefix("role."): v for k, v in given.items() if same and k.startswith("role.") and v}
        page = int(given["page"]) if given.get("page", "").isdigit() else 1
        found = await studio.worker.ask(
            "look", source=source_of(studio, name), base=base, split=given.get("split", ""), format=format,
            columns=roles or None, page=page,
        )  # fmt: skip
        return studio.page(request, "_look.html", name=name, source=source_of(studio, name), page=page, **found)

    @made.post("/{name}/delete")
    async def delete(name: str) -> Response:
        source_of(studio, name)
        if name in BUNDLED:
            raise PageError(409, "What is bundled stays.")
        for file in (studio.workspace.data / name, studio.workspace.data / f"{name}.link.json"):
            if file.is_file():  # what it points to stays
                file.unlink()
        studio.index.sync()
        return go("/data")


async def kept(studio: Studio, file: UploadFile) -> Response:
    """Keep an upload, once it could be read as what it says it is; else nothing of it stays."""
    name = slug(str(file.filename).replace("\\", "/").rpartition("/")[2])
    if not name.lower().endswith(ENDINGS):
        raise PageError(422, "{name}: expected a file of {endings}.", name=file.filename, endings=", ".join(ENDINGS))
    path = studio.workspace.new_file(name)
    try:
        await stored(file, path, studio.settings.max_upload)
        await studio.worker.ask("look", source=studio.workspace.shown(path), base="graftlm-base")
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    await asyncio.to_thread(studio.index.sync)
    return go(f"/data/{path.name}")


async def stored(file: UploadFile, path: Path, most: int) -> None:
    """Write an upload down. PageError: it has more bytes than `most`."""
    written = 0
    with path.open("wb") as out:
        while piece := await file.read(PIECE):
            written += len(piece)
            if written > most:
                raise PageError(413, LARGE, most=most // 2**20)
            await asyncio.to_thread(out.write, piece)


def source_of(studio: Studio, name: str) -> str:
    """What a recipe calls a data set. PageError: there is none, or it may not be read (any more)."""
    if name in BUNDLED:
        return name
    found: DataSet | None = next((s for s in studio.index.data_sets() if s.name == name), None)
    if found is None:
        raise PageError(404, "There is no data set {name!r} here.", name=name)
    studio.workspace.path(found.path)
    return found.path
