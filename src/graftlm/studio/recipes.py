"""Recipes in the workspace: what a run is asked for, and which paths a recipe may name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from .errors import PageError
from .index import SETTINGS
from .jobs import Jobs
from .workspace import Workspace, slug

OWN = ("output_dir", "overwrite", "resume")  # of a recipe, the studio's to say
PATHS = ("base", "data.source", "init_from")
STARTS = ("/", "~", ".", "\\")  # of what can only be a path
EXAMPLES: dict[str, dict[str, Any]] = {
    "tweets": {
        "title": "Sort complaints", "about": "Label short messages as complaint or no complaint. 50 examples.",
        "recipe": {"data": {"source": "tweets"}, "method": "lora"},
    },
    "quotes": {
        "title": "Write tags for quotes", "about": "Complete a quote with its author's tags.",
        "recipe": {"data": {"source": "quotes"}, "method": "lora"},
    },
    "alpaca-zh": {
        "title": "Answer in Chinese", "about": "Instructions and answers in Chinese.",
        "recipe": {"data": {"source": "alpaca-zh"}, "method": "p-tuning"},
    },
}  # fmt: skip


def content_of(text: str) -> dict[str, Any]:
    """A YAML text's keys and values; {} where it is none (its check says why)."""
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def outside(workspace: Workspace, text: str) -> list[dict[str, str]]:
    """Paths in a recipe that the studio may not read, as problems."""
    found = []
    for key, value in leaves(content_of(text)):
        named = key in PATHS and value.startswith(STARTS)
        if not named and not exists(workspace, value):
            continue
        try:
            workspace.path(value)
        except PageError as error:
            if error.status == 403:
                found.append({"key": key, "text": f"{key}: {error}"})
    return found


def permit(workspace: Workspace, text: str) -> None:
    """PageError where a base or a data set is named by a path that may not be read, or that is not there."""
    if text.startswith(STARTS) or exists(workspace, text):
        workspace.path(text)


def exists(workspace: Workspace, text: str) -> bool:
    """Whether a text is a path that is there."""
    try:
        return bool(text) and (workspace.root / Path(text).expanduser()).exists()
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, no such user: no path
        return False


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Texts in nested values, with their dotted keys."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner, key)


def name_for(content: dict[str, Any]) -> str:
    """What a run is called where nobody says: lora-tweets."""
    data = content.get("data")
    source = str(data.get("source", "tweets")) if isinstance(data, dict) else "tweets"
    return slug(f"{content.get('method', 'lora')}-{Path(source).stem}")


def start(workspace: Workspace, jobs: Jobs, texts: Sequence[str], title: str = "") -> list[Path]:
    """Queue a run of a recipe that was checked, or several that train together; their folders."""
    folders = []
    for text in texts:
        content = content_of(text)
        folder = workspace.new_run(title or name_for(content))
        content |= {"output_dir": f"runs/{folder.name}"}
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        (folder / SETTINGS).write_text(text, encoding="utf-8")
        folders.append(folder)
    files = [workspace.shown(folder / SETTINGS) for folder in folders]
    jobs.add(folders, "train", ["train", *files, "--progress"], title=title)
    return folders
