"""Adapters: the list, those from elsewhere, each one's card and files, what can be made of it, the server."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from starlette.datastructures import UploadFile

from .. import adapters as files
from .. import bases, recipes, records
from ..errors import PageError
from ..jobs import ORIGIN
from ..studio import Studio, go
from .data import stored

# what is made -> its job's arguments before the adapter and its new directory
MAKES = {
    "merge": ["merge", "--adapter"], "convert": ["convert"], "vllm": ["export", "--to", "vllm"],
    "gguf": ["export", "--to", "gguf"], "ollama": ["export", "--to", "ollama"],
}  # fmt: skip
RANKED = ("convert", "vllm")  # which become a LoRA
AS_IT_IS = ("LORA", "PROMPT_TUNING", "P_TUNING")  # what goes to vLLM without becoming another one
PAGE = 50
RANK = "16"  # of a LoRA that another adapter becomes


def router(studio: Studio) -> APIRouter:
    """Routes of the pages."""
    made = APIRouter(prefix="/adapters")
    add_list(made, studio)
    add_files(made, studio)
    add_actions(made, studio)
    return made


def add_list(made: APIRouter, studio: Studio) -> None:
    @made.get("")
    def adapters(request: Request, q: str = "", page: int = 1) -> Response:
        studio.refresh()
        count = studio.index.count(text=q, adapters=True)
        pages = -(-count // PAGE) or 1
        page = max(1, min(page, pages))
        found = studio.index.runs(limit=PAGE, offset=(page - 1) * PAGE, text=q, adapters=True)
        return studio.page(
            request, "adapters.html", runs=found, q=q, count=count, page=page, pages=pages, server=studio.server,
            bases=bases.known(studio.workspace),
        )  # fmt: skip

    @made.post("/point")
    async def point(request: Request) -> Response:
        form = await request.form()
        source = studio.workspace.path(str(form.get("path", "")).strip() or "?")
        if not source.is_dir():
            raise PageError(422, "{name}: expected a folder with an adapter.", name=source.name)
        return await taken_in(studio, source, source.name, str(form.get("base", "")))

    @made.post("/upload")
    async def upload(request: Request) -> Response:
        form = await request.form(max_files=1)
        file = form.get("file")
        if not isinstance(file, UploadFile) or not str(file.filename).lower().endswith(".zip"):
            raise PageError(422, "Choose a zip with an adapter's files.")
        path = studio.workspace.own / f"upload-{id(file)}.zip"
        try:
            await stored(file, path, studio.settings.max_upload)
            return await taken_in(studio, path, str(file.filename)[:-4], str(form.get("base", "")))
        finally:
            path.unlink(missing_ok=True)


async def taken_in(studio: Studio, source: Path, name: str, base: str) -> Response:
    """Take an adapter in, and show it."""
    recipes.permit(studio.workspace, base)
    folder = await asyncio.to_thread(files.take_in, studio.workspace, source, name, base)
    await asyncio.to_thread(studio.index.sync)
    return go(f"/adapters/{folder.name}")


def add_files(made: APIRouter, studio: Studio) -> None:
    @made.get("/{name}")
    def adapter(request: Request, name: str) -> Response:
        folder = files.folder_of(studio.workspace, name)
        card = folder / files.CARD
        return studio.page(
            request, "adapter.html", name=name, config=records.read(folder / files.CONFIG), makes=MAKES, ranked=RANKED,
            rank=RANK, base=files.base_of(studio.workspace, name), origin=records.read(folder / ORIGIN),
            checkpoints=files.checkpoints(folder), server=studio.server,
            files=[(f, (folder / f).stat().st_size) for f in files.FILES if (folder / f).is_file()],
            card=card.read_text(encoding="utf-8", errors="replace") if card.is_file() else "",
        )  # fmt: skip

    @made.get("/{name}/files/{file}")
    def file(name: str, file: str) -> Response:
        folder = files.folder_of(studio.workspace, name)
        if file not in files.FILES or not (folder / file).is_file():
            raise PageError(404, "{name} has no file {file!r}.", name=name, file=file)
        return FileResponse(studio.workspace.path(str(folder / file)), filename=f"{name}-{file}")

    @made.get("/{name}/zip")
    def zipped(name: str) -> Response:
        return as_zip(name, files.files_of(studio.workspace, files.folder_of(studio.workspace, name)))


def as_zip(name: str, content: list[tuple[Path, str]]) -> Response:
    """Files as a zip to download."""
    headers = {"Content-Disposition": f'attachment; filename="{name}.zip"'}
    return StreamingResponse(files.zipped(content), media_type="application/zip", headers=headers)


def add_actions(made: APIRouter, studio: Studio) -> None:
    @made.post("/{name}/make")
    async def make(request: Request, name: str) -> Response:
        kind = records.read(files.folder_of(studio.workspace, name) / files.CONFIG).get("peft_type")
        form = await request.form()
        what, rank = str(form.get("what", "")), str(form.get("rank", "")).strip()
        if what not in MAKES:
            raise PageError(422, "Expected one of {names}.", names=", ".join(MAKES))
        if rank and not rank.replace(".", "", 1).isdigit():
            raise PageError(422, "Rank: expected a number, or a share such as 0.95, got {rank!r}.", rank=rank)
        folder = studio.workspace.new_run(f"{name}-{'lora' if what == 'convert' else what}")
        base = permitted_base(studio, name)
        args = [*MAKES[what], f"runs/{name}", "--output", f"runs/{folder.name}/out", "--base", base]
        lift = what == "convert"
        if lift or what in RANKED and (rank or kind not in AS_IT_IS):
            args += ["--rank", rank or RANK]
        if lift:
            records.write(folder / ORIGIN, {"from": name, "base": base})
        return await studio.begin(folder, what, args, lift=lift, title=name)

    @made.post("/{name}/folder")
    async def folder(request: Request, name: str) -> Response:
        source = files.folder_of(studio.workspace, name)
        wanted = str((await request.form()).get("path", "")).strip() or f"exports/{name}"
        target = await asyncio.to_thread(files.put_out, studio.workspace, source, wanted)
        return studio.page(request, "_done.html", text="The files are in {place}.", values={"place": target})

    @made.post("/{name}/checkpoints/{checkpoint}")
    async def checkpoint(name: str, checkpoint: str) -> Response:
        folder = studio.workspace.run(name)
        if checkpoint not in files.checkpoints(folder):
            raise PageError(404, "{name} has no checkpoint {checkpoint!r}.", name=name, checkpoint=checkpoint)
        return await taken_in(studio, folder / checkpoint, f"{name}-{checkpoint}", files.base_of(studio.workspace, name))

    @made.post("/{name}/load")
    async def load(request: Request, name: str) -> Response:
        files.folder_of(studio.workspace, name)
        await studio.server.use(permitted_base(studio, name))
        await studio.server.load(name)
        return studio.page(request, "_server.html", server=studio.server, name=name)


def permitted_base(studio: Studio, name: str) -> str:
    """An adapter's base. PageError: an adapter from elsewhere names a path that may not be read."""
    base = files.base_of(studio.workspace, name)
    recipes.permit(studio.workspace, base)
    return base
