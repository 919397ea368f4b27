"""The data sets that come with GraftLM: small, written for it, in the columns of what they stand in for."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import DatasetDict

# name -> {column: dtype, or the names of a ClassLabel, or ["string"] for a list of texts}
BUNDLED: dict[str, dict[str, Any]] = {
    "tweets": {"Tweet text": "string", "ID": "int32", "Label": ("Unlabeled", "complaint", "no complaint")},
    "prompts": {"act": "string", "prompt": "string"},
    "quotes": {"quote": "string", "author": "string", "tags": ["string"]},
    "alpaca-zh": {"instruction": "string", "input": "string", "output": "string"},
    "adgen-zh": {"content": "string", "summary": "string"},
}


def load_bundled(name: str) -> DatasetDict:
    """The bundled data set ``name`` with its splits ``train`` and ``test``."""
    from datasets import Dataset, DatasetDict, Features

    features = Features({column: _feature(kind) for column, kind in BUNDLED[name].items()})
    folder = files("graftlm") / "assets" / "datasets" / name
    parts = {}
    for split in ("train", "test"):
        lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").strip().split("\n")
        parts[split] = Dataset.from_list([json.loads(line) for line in lines], features=features)
    return DatasetDict(parts)


def _feature(kind: Any) -> Any:
    from datasets import ClassLabel, List, Value

    if isinstance(kind, tuple):
        return ClassLabel(names=list(kind))
    return List(Value(kind[0])) if isinstance(kind, list) else Value(kind)
