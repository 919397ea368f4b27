"""Adapters: the list, each one's card and files, and what can be made of it."""

from __future__ import annotations

import asyncio
import io
import zipfile
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse

from .. import records
from ..errors import PageError
from ..studio import Studio, go
from .chat import base_of

FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md", "recipe.yaml", "metrics.json", "loss.png")
# what is made -> its job's arguments before the adapter and its new directory
MAKES = {
    "merge": ["merge", "--adapter"], "convert": ["convert"], "vllm": ["export", "--to", "vllm"],
    "gguf": ["export", "--to", "gguf"], "ollama": ["export", "--to", "ollama"],
}  # fmt: skip


def router(studio: Studio) -> APIRouter:
    """Routes of the pages."""
    made = APIRouter(prefix="/adapters")

    @made.get("")
    def adapters(request: Request, q: str = "") -> Response:
        studio.index.sync()
        found = studio.index.runs(limit=200, text=q, adapters=True)
        return studio.page(request, "adapters.html", runs=found, q=q, count=studio.index.count(text=q, adapters=True))

    @made.get("/{name}")
    def adapter(request: Request, name: str) -> Response:
        folder = folder_of(studio, name)
        card = folder / "README.md"
        return studio.page(
            request, "adapter.html", name=name, config=records.read(folder / FILES[0]), base=base_of(studio, name),
            files=[(f, (folder / f).stat().st_size) for f in FILES if (folder / f).is_file()], makes=MAKES,
            card=card.read_text(encoding="utf-8", errors="replace") if card.is_file() else "",
        )  # fmt: skip

    @made.get("/{name}/files/{file}")
    def file(name: str, file: str) -> Response:
        folder = folder_of(studio, name)
        if file not in FILES or not (folder / file).is_file():
            raise PageError(404, f"{name} has no file {file!r}.")
        return FileResponse(studio.workspace.path(str(folder / file)), filename=f"{name}-{file}")

    @made.get("/{name}/zip")
    async def zipped(name: str) -> Response:
        content = await asyncio.to_thread(packed, studio, folder_of(studio, name))
        headers = {"Content-Disposition": f'attachment; filename="{name}.zip"'}
        return Response(content, media_type="application/zip", headers=headers)

    @made.post("/{name}/make")
    async def make(request: Request, name: str) -> Response:
        folder_of(studio, name)
        what = str((await request.form()).get("what", ""))
        if what not in MAKES:
            raise PageError(422, f"Expected one of {', '.join(MAKES)}.")
        folder = studio.workspace.new_run(f"{name}-{'lora' if what == 'convert' else what}")
        args = [*MAKES[what], f"runs/{name}", "--output", f"runs/{folder.name}/out", "--base", base_of(studio, name)]
        await asyncio.to_thread(studio.jobs.add, folder, what, args, lift=what == "convert", title=name)
        await asyncio.to_thread(studio.index.note, folder)
        return go(f"/runs/{folder.name}")

    return made


def folder_of(studio: Studio, name: str) -> Path:
    """An adapter's folder. PageError: there is none."""
    folder = studio.workspace.run(name)
    if not (folder / FILES[0]).is_file():
        raise PageError(404, f"{name} has no adapter.")
    return folder


def packed(studio: Studio, folder: Path) -> bytes:
    """An adapter's files as a zip; weights as they are, which compression would not make smaller."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as made:
        for name in FILES:
            if (folder / name).is_file():
                made.write(studio.workspace.path(str(folder / name)), f"{folder.name}/{name}")
    return out.getvalue()
