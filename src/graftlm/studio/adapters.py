"""Adapters of the workspace: their files, the base of each, those that come from elsewhere, and what leaves."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from . import records
from .errors import PageError
from .index import base_beside, recipe_in
from .jobs import ORIGIN
from .server import WEIGHTS
from .workspace import Workspace

CONFIG, CARD = "adapter_config.json", "README.md"
FILES = (CONFIG, WEIGHTS, CARD, "recipe.yaml", "metrics.json", "loss.png")
COMES = (CONFIG, WEIGHTS, CARD)  # of an adapter from elsewhere
LARGEST = 64 * 2**30  # bytes of a file in a zip
PIECE = 2**20


def folder_of(workspace: Workspace, name: str) -> Path:
    """An adapter's folder. PageError: there is none."""
    folder = workspace.run(name)
    if not (folder / CONFIG).is_file():
        raise PageError(404, "{name} has no adapter.", name=name)
    return folder


def base_of(workspace: Workspace, name: str) -> str:
    """The base that an adapter's recipe names, else that was chosen for it or that it names itself, else the bundled one."""
    folder = workspace.run(name)
    found = (recipe_in(folder) or {}).get("base") or base_beside(folder, records.read(folder / CONFIG))
    return str(found or "graftlm-base")


def checkpoints(folder: Path) -> list[str]:
    """Names of a run's checkpoints that hold an adapter, in the order of their steps. What is written last is there."""
    found = [p.parent.name for p in folder.glob("checkpoint-*/trainer_state.json") if (p.parent / CONFIG).is_file()]
    return sorted(found, key=lambda name: (len(name), name))


def take_in(workspace: Workspace, source: Path, wanted: str, base: str) -> Path:
    """Copy an adapter of GraftLM or HF PEFT, a folder or a zip of one, into the workspace; its new folder.

    Raises:
        PageError: it is none, or not whole: nothing of it stays.
    """
    folder = workspace.new_run(wanted)
    try:
        if source.is_dir():
            for name in COMES:
                if (source / name).is_file():
                    shutil.copyfile(workspace.path(str(source / name)), folder / name)
        else:
            unpack(source, folder)
        check(folder, source.name)
        records.write(folder / ORIGIN, {"from": wanted, "base": base})
    except BaseException:
        shutil.rmtree(folder)
        raise
    return folder


def unpack(source: Path, folder: Path) -> None:
    """The files of an adapter out of a zip, whatever folder they have in it: no path of a zip is followed."""
    try:
        with zipfile.ZipFile(source) as packed:
            for entry in packed.infolist():
                name = entry.filename.rpartition("/")[2]
                if name not in COMES or (folder / name).exists():
                    continue
                if entry.file_size > LARGEST:
                    raise PageError(413, "{name}: too large.", name=name)
                with packed.open(entry) as content, (folder / name).open("wb") as out:
                    shutil.copyfileobj(content, out)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:  # RuntimeError: a password
        raise PageError(422, "{name} is no zip that can be read: {error}", name=source.name, error=error) from error


def check(folder: Path, what: str) -> None:
    """PageError where a folder holds no adapter that can be loaded."""
    config, weights = records.read(folder / CONFIG), folder / WEIGHTS
    if not config.get("peft_type"):
        raise PageError(422, "{name} is no adapter: expected a {file} that names its peft_type.", name=what, file=CONFIG)
    if not weights.is_file():
        raise PageError(
            422,
            "{name} has no {file}. Pickled weights (adapter_model.bin) are not read here; save them as safetensors.",
            name=what,
            file=WEIGHTS,
        )
    try:
        with weights.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 0 < size <= weights.stat().st_size - 8:
                raise ValueError("its header is longer than the file")
            json.loads(file.read(size))
    except ValueError as error:
        raise PageError(
            422, "{name}: {file} is no safetensors file: {error}", name=what, file=WEIGHTS, error=error
        ) from error


def put_out(workspace: Workspace, folder: Path, text: str) -> Path:
    """Copy an adapter's files into a new folder of the workspace or of a folder that was given; that folder."""
    target = workspace.target(text)
    target.mkdir(parents=True)
    for name in FILES:
        if (folder / name).is_file():
            shutil.copyfile(workspace.path(str(folder / name)), target / name)
    return target


class Pieces:
    """What a zip is written into: kept until it is taken."""

    def __init__(self) -> None:
        self.kept = bytearray()

    def write(self, content: bytes) -> int:
        self.kept += content
        return len(content)

    def flush(self) -> None:
        """Nothing waits anywhere else."""

    def take(self) -> bytes:
        found = bytes(self.kept)
        self.kept.clear()
        return found


def zipped(files: list[tuple[Path, str]]) -> Iterator[bytes]:
    """A zip in pieces, of files by the names that they have in it; weights as they are, which packing makes no smaller."""
    out: Any = Pieces()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as made:
        for path, name in files:
            entry = zipfile.ZipInfo.from_file(path, name)
            with path.open("rb") as content, made.open(entry, "w", force_zip64=True) as into:
                yield from copied(content, into, out)
    yield out.take()


def copied(content: IO[bytes], into: IO[bytes], out: Pieces) -> Iterator[bytes]:
    while piece := content.read(PIECE):
        into.write(piece)
        yield out.take()


def files_of(workspace: Workspace, folder: Path) -> list[tuple[Path, str]]:
    """An adapter's files, as a zip has them."""
    found = [(folder / name, f"{folder.name}/{name}") for name in FILES if (folder / name).is_file()]
    return [(workspace.path(str(path)), name) for path, name in found]
