"""The files of an adapter directory, read without a base, broken ones too: what can be read is, the rest is a problem."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..checkpoint import TRAINING_NAME
from ..errors import CheckpointError, GraftError
from ..files import PICKLE_NAME, WEIGHTS_NAME, header_of, parse_json, read_text
from ..methods import BottleneckConfig, PeftConfig
from ..methods.base import CONFIG_NAME
from ..quantization import config_scheme

BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


@dataclass(frozen=True)
class TensorFacts:
    """One tensor of a weights file."""

    key: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * BYTES.get(self.dtype, 1)


@dataclass
class AdapterFiles:
    """What one adapter directory holds. `problems` is empty where it can be used."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    parsed: PeftConfig | None = None
    header: dict[str, Any] = field(default_factory=dict)
    tensors: list[TensorFacts] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        return sum(t.count for t in self.tensors)

    @property
    def file_bytes(self) -> int:
        path = self.folder / WEIGHTS_NAME
        return path.stat().st_size if path.is_file() else 0

    @property
    def has_training_state(self) -> bool:
        return (self.folder / TRAINING_NAME).is_file()

    def settings(self) -> dict[str, Any]:
        """The configuration's fields that say something: set, and not shown elsewhere."""
        elsewhere = ("peft_type", "task_type", "base_model_name_or_path", "inference_mode", "peft_version")
        own = self.header.get("config", {})
        return {k: v for k, v in {**self.config, **own}.items() if k not in elsewhere and v not in (None, False, [], {}, "")}

    def facts(self) -> list[tuple[str, str]]:
        """Label and value, for a person."""
        dtypes = ", ".join(sorted({t.dtype for t in self.tensors})) or "none"
        return [
            ("method", str(self.config.get("peft_type", "unknown"))),
            ("task", str(self.config.get("task_type") or "not recorded")),
            ("base", str(self.config.get("base_model_name_or_path") or "not recorded")),
            ("base fingerprint", self.fingerprint()),
            ("parameters", f"{self.parameters:,} ({dtypes})"),
            ("weights file", f"{self.file_bytes:,} bytes"),
            ("training state", "a file of its own" if self.has_training_state else "none beside the weights"),
        ]

    def fingerprint(self) -> str:
        base = self.header.get("base")
        if not base:
            return "none in this file"
        form = base.get("form") or ("quantised" if base.get("quantized") else "")
        kind = f"{base.get('model_type')}{f' in {form}' if form else ''}"
        return f"{kind}, samples of {', '.join(base.get('samples', {})) or 'nothing'}"

    def as_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return {
            "directory": str(self.folder),
            "method": self.config.get("peft_type"),
            "task_type": self.config.get("task_type"),
            "base_model": self.config.get("base_model_name_or_path"),
            "config": self.config,
            "own_config": self.header.get("config", {}),
            "base_fingerprint": self.header.get("base"),
            "parameters": self.parameters,
            "file_bytes": self.file_bytes,
            "training_state": self.has_training_state,
            "tensors": [{"key": t.key, "shape": list(t.shape), "dtype": t.dtype, "bytes": t.nbytes} for t in self.tensors],
            "notes": self.notes,
            "problems": self.problems,
        }


def read_adapters(folder: Path) -> list[AdapterFiles]:
    """The adapter in a folder, and those in folders just below it (HF PEFT's layout for several).

    Raises:
        CheckpointError: there is none.
    """
    folders = [p for p in (folder, *sorted(folder.iterdir())) if p.is_dir() and is_adapter(p)]
    if not folders:
        here = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing"
        raise CheckpointError(
            f"{folder} holds no adapter ({CONFIG_NAME}, {WEIGHTS_NAME}). It holds {here}.{whole_model(folder)}"
        )
    return [read(p) for p in folders if "checkpoint-" not in p.name or p == folder]


def whole_model(folder: Path) -> str:
    """A sentence for a folder that holds a base model, with its quantisation."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    scheme = config_scheme(SimpleNamespace(**config)) if isinstance(config, dict) else None
    return f" It looks like a whole model{f' in {scheme}' if scheme else ''}; pass it as --base."


def is_adapter(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME))


def read(folder: Path) -> AdapterFiles:
    """One directory; problems are collected, not raised."""
    found = AdapterFiles(folder)
    read_config(found)
    read_weights(found)
    if found.config and not found.problems:
        try:
            found.parsed = PeftConfig.from_pretrained(folder)
        except (GraftError, TypeError, ValueError) as error:
            found.problems.append(str(error))
    add_notes(found)
    return found


def read_config(found: AdapterFiles) -> None:
    path = found.folder / CONFIG_NAME
    try:
        values = parse_json(read_text(path, CheckpointError), CONFIG_NAME, CheckpointError)
    except FileNotFoundError:
        found.problems.append(f"{CONFIG_NAME} is missing: which method the tensors belong to is not known.")
        return
    except (OSError, CheckpointError) as error:
        found.problems.append(f"{CONFIG_NAME} cannot be read: {error}")
        return
    if not isinstance(values, dict):
        found.problems.append(f"{CONFIG_NAME} holds a {type(values).__name__}, expected an object.")
        return
    found.config = values


def read_weights(found: AdapterFiles) -> None:
    from safetensors import SafetensorError, safe_open

    path = found.folder / WEIGHTS_NAME
    if not path.is_file():
        if (found.folder / PICKLE_NAME).is_file():
            found.problems.append(f"The weights are in {PICKLE_NAME}, a pickle file; convert it to {WEIGHTS_NAME}.")
        else:
            found.problems.append(f"{WEIGHTS_NAME} is missing.")
        return
    try:
        found.header = header_of(path)
        with safe_open(path, framework="numpy") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            found.tensors = [TensorFacts(k, tuple(s.get_shape()), str(s.get_dtype())) for k, s in sorted(slices.items())]
    except (CheckpointError, SafetensorError, OSError, ValueError) as error:
        found.problems.append(str(error))
        return
    if not found.tensors:
        found.problems.append(f"{WEIGHTS_NAME} holds no tensors.")


def add_notes(found: AdapterFiles) -> None:
    """Who wrote the directory, and what HF PEFT makes of it."""
    own = sorted(k for k, v in found.header.get("config", {}).items() if v not in (None, False, [], {}, ""))
    if not found.tensors:
        return
    if not found.header:
        found.notes.append("Written by HF PEFT or another tool: no base fingerprint, so only keys and shapes tell the base.")
    elif isinstance(found.parsed, BottleneckConfig):
        found.notes.append("HF PEFT has no bottleneck adapters: only GraftLM loads this directory.")
    elif own:
        found.notes.append(f"HF PEFT loads this directory, but does not know {', '.join(own)}.")
    else:
        found.notes.append("HF PEFT loads this directory as it is.")
    if found.has_training_state:
        found.notes.append(f"{TRAINING_NAME} holds what further training needs (the network behind the soft prompt).")
