"""The documents' code, run as printed but for the import and what each test names.

`scripts/` holds the code of each document, written for HF PEFT. `Workplace.run` replaces the library's name in its imports,
makes the replacements that a test lists (each must fit exactly once or it fails), and runs the script in a folder where the
documents' model and data names are local directories. Nothing touches the network.
"""

from __future__ import annotations

import contextlib
import io
import random
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

SCRIPTS = Path(__file__).parent / "scripts"
LAYERS = 2


@dataclass(frozen=True)
class Workplace:
    """A folder with what the documents load."""

    folder: Path

    def model(self, name: str, source: Path) -> None:
        """Let `name` be the model saved at `source`."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(source)

    def run(self, script: str, library: str = "graftlm", replace: dict[str, str] | None = None, **names):
        """Run a document; returns its variables, with `printed` among them."""
        source = (SCRIPTS / f"{script}.py").read_text(encoding="utf-8")
        source = re.sub(r"^from peft\b", f"from {library}", source, flags=re.MULTILINE)
        for old, new in (replace or {}).items():
            assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {script}"
            source = source.replace(old, new)
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        variables = {"__name__": "__main__", "display": print} | names
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(source, script, "exec"), variables)
        return SimpleNamespace(**variables | {"printed": printed.getvalue()})


def losses(trainer: Any) -> list[float]:
    """What a Trainer logged."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def files(folder: str | Path) -> set[str]:
    """Names of the files in a folder."""
    return {path.name for path in Path(folder).iterdir() if path.is_file()}
