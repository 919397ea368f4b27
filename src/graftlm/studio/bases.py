"""Base models that are here already: bundled, in the workspace and the given folders, in the Hub's cache."""

from __future__ import annotations

import os
from pathlib import Path

from ..bundled import NAMES, available
from .workspace import Workspace


def known(workspace: Workspace) -> list[dict[str, str]]:
    """Names as recipes take them, and where each is from."""
    found = [{"name": name, "from": "bundled"} for name in NAMES if available(name)]
    for root in (workspace.root / "bases", *workspace.given):
        for path in sorted(root.iterdir()) if root.is_dir() else ():
            if path.suffix.lower() == ".gguf" or is_model(path):
                found.append({"name": workspace.shown(path), "from": "folder"})
    return found + [{"name": name, "from": "cache"} for name in cached()]


def is_model(path: Path) -> bool:
    """Whether a folder holds a model of transformers with its weights."""
    return (path / "config.json").is_file() and any(path.glob("*.safetensors"))


def cached() -> list[str]:
    """Hub ids whose weights are in the cache."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    folder = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    models = sorted(folder.glob("models--*")) if folder.is_dir() else []
    return [
        m.name.removeprefix("models--").replace("--", "/") for m in models if any(is_model(s) for s in m.glob("snapshots/*"))
    ]
