"""The SQLite file: runs, data sets and chats, found without opening their folders.

The folders are the truth. What is indexed of a run is read off its folder whenever its state changes; runs that came or
went by other hands are noticed by their names (`sync`). `rebuild` makes the file anew.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from sqlmodel import Field, Session, SQLModel, col, create_engine, func, or_, select

from . import records
from .jobs import JOB, ORIGIN, kind_of, state_of
from .workspace import Workspace

VERSION = 1  # of the tables; a file with another is made anew
COARSE = 3.0  # seconds, of the clocks of file systems
SETTINGS, RECIPE = "settings.yaml", "recipe.yaml"


class Run(SQLModel, table=True):
    """A run, by its folder's name."""

    name: str = Field(primary_key=True)
    kind: str = "train"
    state: str = Field(default="unknown", index=True)
    method: str = ""
    base: str = ""
    data: str = ""
    created: float = Field(default=0.0, index=True)
    ended: float | None = None
    loss_before: float | None = None
    loss: float | None = None
    accuracy: float | None = None
    adapter: bool = Field(default=False, index=True)
    title: str = ""


class DataSet(SQLModel, table=True):
    """A file or folder of examples, by the name under which it is shown; path as recipes name it."""

    name: str = Field(primary_key=True)
    path: str
    size: int = 0
    added: float = 0.0


class Chat(SQLModel, table=True):
    """A conversation, by its file's name."""

    name: str = Field(primary_key=True)
    title: str = ""
    base: str = ""
    changed: float = Field(default=0.0, index=True)
    votes: int = 0


TABLES: tuple[type[SQLModel], ...] = (Run, DataSet, Chat)


class Index:
    """The index of a workspace, made where it is missing or not readable as this version's."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._looked: dict[str, tuple[float, float]] = {}  # of each folder: when it was looked at, and its time then
        self.path = workspace.own / "index.sqlite"
        self.engine = create_engine(f"sqlite:///{self.path}", connect_args={"check_same_thread": False})
        with self.engine.connect() as connection:
            version = connection.exec_driver_sql("PRAGMA user_version").scalar()
        if version != VERSION:
            self.rebuild()

    def rebuild(self) -> dict[str, int]:
        """Make the tables anew out of the folders; how many rows each has."""
        self._looked.clear()
        tables: Any = [t.__table__ for t in TABLES]  # type: ignore[attr-defined]
        SQLModel.metadata.drop_all(self.engine, tables=tables)
        SQLModel.metadata.create_all(self.engine, tables=tables)
        with self.engine.begin() as connection:
            connection.exec_driver_sql(f"PRAGMA user_version = {VERSION}")
        self.sync()
        with Session(self.engine) as session:
            return {t.__name__: session.exec(select(func.count()).select_from(t)).one() for t in TABLES}

    def sync(self) -> None:
        """Take in what came into the folders, and let go of what went."""
        w = self.workspace
        if self._changed(w.runs):
            self._match(Run, {e.name for e in os.scandir(w.runs) if e.is_dir()}, lambda name: run_row(w.runs / name))
        if self._changed(w.data):
            files = {e.name for e in os.scandir(w.data) if not e.name.startswith(".")}
            self._match(DataSet, {name.removesuffix(".link.json") for name in files}, lambda name: data_row(w, name))
        if self._changed(w.chats):
            chats = {e.name.removesuffix(".json") for e in os.scandir(w.chats) if e.name.endswith(".json")}
            self._match(Chat, {c for c in chats if not c.startswith(".")}, lambda name: chat_row(w.chats / f"{name}.json"))

    def _changed(self, folder: Path) -> bool:
        """Whether names may have come or gone since the last look. A folder's time is as coarse as the file system's clock:
        one that changed just before the look may have changed again just after it."""
        now, changed = time.time(), folder.stat().st_mtime
        looked, seen = self._looked.get(folder.name, (0.0, 0.0))
        self._looked[folder.name] = now, changed
        return changed != seen or looked - changed < COARSE

    def _match(self, table: Any, there: set[str], row: Any) -> None:
        with Session(self.engine) as session:
            known = set(session.exec(select(table.name)).all())
            for name in known - there:
                session.delete(session.get(table, name))
            for name in there - known:
                session.add(row(name))
            session.commit()

    def put(self, row: SQLModel) -> None:
        """Write a row, in the place of the one before."""
        with Session(self.engine) as session:
            session.merge(row)
            session.commit()

    def note(self, folder: Path) -> None:
        """Read a run's folder again."""
        self.put(run_row(folder))

    def runs(
        self, *, limit: int = 50, offset: int = 0, text: str = "", state: str = "", kind: str = "", adapters: bool = False
    ) -> list[Run]:
        """Runs, the latest first. text: in name, method, base or data."""
        with Session(self.engine) as session:
            wanted = self._wanted(select(Run), text, state, adapters)
            wanted = (wanted.where(Run.kind == kind) if kind else wanted).order_by(col(Run.created).desc(), col(Run.name))
            return list(session.exec(wanted.offset(offset).limit(limit)).all())

    def count(self, *, text: str = "", state: str = "", adapters: bool = False) -> int:
        """How many runs there are of these."""
        with Session(self.engine) as session:
            return session.exec(self._wanted(select(func.count()).select_from(Run), text, state, adapters)).one()

    @staticmethod
    def _wanted(query: Any, text: str, state: str, adapters: bool) -> Any:
        if text:
            fields = (Run.name, Run.method, Run.base, Run.data, Run.title)
            query = query.where(or_(*(col(f).contains(text, autoescape=True) for f in fields)))
        query = query.where(Run.state == state) if state else query
        return query.where(col(Run.adapter)) if adapters else query

    def run(self, name: str) -> Run | None:
        with Session(self.engine) as session:
            return session.get(Run, name)

    def data_sets(self) -> Sequence[DataSet]:
        with Session(self.engine) as session:
            return session.exec(select(DataSet).order_by(col(DataSet.added).desc())).all()

    def chats(self, limit: int = 50) -> Sequence[Chat]:
        with Session(self.engine) as session:
            return session.exec(select(Chat).order_by(col(Chat.changed).desc()).limit(limit)).all()


# -- rows out of folders ---------------------------------------------------------------------------------------------------
def run_row(folder: Path) -> Run:
    """A run as its folder has it."""
    job, state = records.read(folder / JOB), state_of(folder)
    recipe, config = recipe_in(folder), records.read(folder / "adapter_config.json")
    measures = records.read(folder / "metrics.json").get("metrics", {})
    return Run(
        name=folder.name, kind=kind_of(folder), state=state.get("state", "unknown"),
        method=text_of(recipe, "method", "lora" if recipe is not None else str(config.get("peft_type") or "").lower()),
        base=text_of(recipe, "base", "graftlm-base" if recipe is not None else base_beside(folder, config)),
        data=text_of((recipe or {}).get("data"), "source", ""),
        created=job.get("created") or folder.stat().st_mtime, ended=state.get("ended"),
        loss_before=measures.get("loss_before"), loss=measures.get("loss"), accuracy=measures.get("accuracy"),
        adapter=bool(config), title=job.get("title", ""),
    )  # fmt: skip


def recipe_in(folder: Path) -> dict[str, Any] | None:
    """The recipe that a run was asked for, else the one that it wrote; None where there is none."""
    for name in (SETTINGS, RECIPE):
        try:
            found = yaml.safe_load((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if isinstance(found, dict):
            return found
    return None


def base_beside(folder: Path, config: dict[str, Any]) -> str:
    """The base of an adapter that has no recipe: what was chosen when it came, or what it names itself."""
    return str(records.read(folder / ORIGIN).get("base") or config.get("base_model_name_or_path") or "")


def text_of(section: Any, key: str, otherwise: str) -> str:
    return str(section.get(key, otherwise)) if isinstance(section, dict) else otherwise


def data_row(workspace: Workspace, name: str) -> DataSet:
    """A data set as its file, or the note of where it lies, has it."""
    file = workspace.data / name
    link = workspace.data / f"{name}.link.json"
    place = file if file.exists() else link
    path = workspace.shown(file) if file.exists() else str(records.read(link).get("path", ""))
    target = workspace.root / path
    size = target.stat().st_size if target.is_file() else 0
    return DataSet(name=name, path=path, size=size, added=place.stat().st_mtime)


def chat_row(file: Path) -> Chat:
    """A conversation as its file has it."""
    found = records.read(file)
    votes = sum(1 for turn in found.get("turns", ()) if turn.get("vote"))
    return Chat(
        name=file.stem, title=found.get("title", ""), base=found.get("base", ""), changed=file.stat().st_mtime, votes=votes
    )
