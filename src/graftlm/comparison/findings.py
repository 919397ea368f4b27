"""What a comparison found, as numbers."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

JSON_NAME = "comparison.json"
REPORT_NAME = "report.html"
DONE, FAILED, INTERRUPTED, WAITING = "done", "failed", "interrupted", "not started"


@dataclass
class MethodRun:
    """One method with one seed.

    Attributes:
        status: "done", "failed", "interrupted" or "not started"; `error` says why it is not done.
        metrics: of `graftlm.training.run` (loss, perplexity, accuracy, each also `…_before`; seconds; bytes).
        history: the Trainer's log, for the curves.
        samples: held-out examples with the text generated before and after.
        recipe: the recipe as YAML; `graftlm train` with it repeats this run.
        directory: where the adapter is, relative to the comparison's directory.
        quantization: how its base is quantised; None if not.
    """

    label: str
    method: str
    seed: int
    directory: str
    recipe: str = ""
    status: str = WAITING
    error: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    quantization: str | None = None


@dataclass(frozen=True)
class Row:
    """All seeds of one method: means and (with several seeds) standard deviations of its metrics."""

    label: str
    runs: list[MethodRun]

    @property
    def quantization(self) -> str | None:
        return self.runs[0].quantization

    @property
    def done(self) -> list[MethodRun]:
        return [r for r in self.runs if r.status == DONE]

    def values(self, key: str) -> list[float]:
        return [float(r.metrics[key]) for r in self.done if r.metrics.get(key) is not None]

    def mean(self, key: str) -> float | None:
        found = self.values(key)
        return statistics.fmean(found) if found else None

    def deviation(self, key: str) -> float | None:
        found = self.values(key)
        return statistics.stdev(found) if len(found) > 1 else None


@dataclass
class Findings:
    """Every method on one base and one data set.

    Attributes:
        base_metrics: of the plain base, on the held-out rows: loss, perplexity, accuracy (None where the task has none); and
            base_bytes, its weights in memory, and quantization. It is the unquantised base, where any method has it.
        quantized: the same of the base in other schemes, by scheme.
        runs: in the order of training.
        search: learning rates that were tried before, by label (see `search`).
        general: source of the general text on which forgetting was measured.
    """

    base: str
    data: str
    output_dir: Path
    base_parameters: int = 0
    eval_rows: int | None = None
    train_rows: int | None = None
    base_metrics: dict[str, Any] = field(default_factory=dict)
    quantized: dict[str, dict[str, Any]] = field(default_factory=dict)
    runs: list[MethodRun] = field(default_factory=list)
    seconds: float = 0.0
    machine: dict[str, Any] = field(default_factory=dict)
    command: str | None = None
    search: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    general: str | None = None

    @property
    def json_path(self) -> Path:
        return self.output_dir / JSON_NAME

    @property
    def report_path(self) -> Path:
        return self.output_dir / REPORT_NAME

    @property
    def interrupted(self) -> bool:
        return any(r.status == INTERRUPTED for r in self.runs)

    @property
    def rows(self) -> list[Row]:
        """The runs by method."""
        labels = list(dict.fromkeys(r.label for r in self.runs))
        return [Row(label, [r for r in self.runs if r.label == label]) for label in labels]

    @property
    def bases(self) -> dict[str, dict[str, Any]]:
        """What was measured of the plain base, in every form, by title."""
        found = (self.base_metrics, *self.quantized.values())
        return {f"base in {m['quantization']}" if m.get("quantization") else "base": m for m in found}

    def before(self, row: Row, key: str) -> float | None:
        """A measure of the plain base that a row's adapters were trained on."""
        own = row.mean(f"{key}_before")
        return self.base_metrics.get(key) if own is None else own

    @property
    def quality(self) -> str:
        """The metric to rank by: "accuracy" for label tasks, else "loss"."""
        has = self.base_metrics.get("accuracy") is not None or any(row.values("accuracy") for row in self.rows)
        return "accuracy" if has else "loss"

    @property
    def best(self) -> Row | None:
        """The best row: by accuracy, ties by loss; or by loss."""
        rows = [r for r in self.rows if r.mean("loss") is not None]
        by_accuracy = self.quality == "accuracy"
        return min(rows, key=lambda r: (-(r.mean("accuracy") or 0) if by_accuracy else 0, r.mean("loss")), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; NaN and infinities are null."""
        values = {f: getattr(self, f) for f in ("base", "data", "base_parameters", "train_rows", "eval_rows")}
        values |= {"base_metrics": self.base_metrics, "quantized": self.quantized, "runs": [asdict(r) for r in self.runs]}
        values |= {"search": self.search, "general": self.general}
        return finite(values | {"seconds": self.seconds, "machine": self.machine, "command": self.command, "format": 1})


def finite(value: Any) -> Any:
    """Plain JSON values, without NaN and infinities."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (str, int, bool)) or value is None else str(value)
