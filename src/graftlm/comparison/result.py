"""What a comparison found, with its files."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..errors import DataError
from ..files import parse_json, read_text
from .findings import JSON_NAME, Findings, MethodRun
from .report import page


class ComparisonResult(Findings):
    """What `compare` returns: the findings, which can be written and read back."""

    def save(self) -> None:
        """Write comparison.json and report.html; each appears whole or not at all."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        write(self.json_path, json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        write(self.report_path, page(self))

    @classmethod
    def load(cls, directory: str | os.PathLike) -> ComparisonResult:
        """Read a comparison's JSON back."""
        folder = Path(directory)
        values = parse_json(read_text(folder / JSON_NAME, DataError), str(folder / JSON_NAME), DataError)
        values.pop("format")
        runs = [MethodRun(**run) for run in values.pop("runs")]
        return cls(**values, runs=runs, output_dir=folder)


def write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
