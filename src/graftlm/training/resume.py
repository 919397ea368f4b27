"""Finding the checkpoint to resume from: the last one that was written whole."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

WEIGHTS = "model.safetensors"
STATE = "trainer_state.json"
PICKLES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
NAME = re.compile(r"checkpoint-(\d+)$")


def flaw(folder: Path) -> str | None:
    """What keeps training from resuming at this checkpoint folder, or None where it is whole.

    A `transformers.Trainer` writes weights, optimizer, schedule and random states, and `trainer_state.json` last.
    """
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except OSError:
        return f"{STATE} is missing"
    except ValueError:
        return f"{STATE} is cut off"
    if "global_step" not in state:
        return f"{STATE} names no step"
    weights = [*folder.glob("*.safetensors")]
    if not weights:
        return "the weights are missing"
    for path in weights:
        try:
            with safe_open(path, framework="pt") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            return f"{path.name} is cut off ({error})"
    for name in PICKLES:
        path = folder / name
        if not path.exists():
            if name == "rng_state.pth" and any(folder.glob("rng_state_*.pth")):
                continue
            return f"{name} is missing"
        if not zipfile.is_zipfile(path):
            return f"{name} is cut off"
    return None


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoint folders in `folder`, by step, oldest first."""
    folder = Path(folder)
    found = [p for p in folder.iterdir() if p.is_dir() and NAME.search(p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(NAME.search(p.name)[1]))  # type: ignore[index]


def last_complete_checkpoint(folder: str | Path, notes: list[str] | None = None) -> Path | None:
    """The newest checkpoint that can be resumed from; the ones passed over are told in `notes`, a line each."""
    for path in reversed(checkpoints(folder)):
        problem = flaw(path)
        if problem is None:
            return path
        if notes is not None:
            notes.append(f"{path} is incomplete ({problem}); passed over.")
    return None
