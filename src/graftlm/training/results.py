"""What a run gave: its measures, put together and written down."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import processes
from ..model import PeftModel
from .evaluation import Evaluation
from .measuring import SAMPLES
from .output import METRICS_NAME, write_text
from .trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run gave.

    Attributes:
        output_dir: the adapter directory.
        metrics: loss_before, loss (nats a labelled held-out token), perplexity_before, perplexity, accuracy_before,
            accuracy (None where the data has no labels), trainable_parameters, file_bytes (the weights file), seconds and
            tokens_per_second (training only, evaluation within it counted in seconds), peak_memory_bytes; quantization (how
            the base is quantised, None if not) and base_bytes (its weights in memory). Of several processes also processes,
            gradient_bytes (exchanged an update) and gathered_bytes (of a sharded base, in a pass).
        history: the Trainer's log_history.
        samples: dicts with prompt, target, before, after.
    """

    output_dir: Path
    metrics: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)


def finish(
    trainer: Trainer,
    model: PeftModel,
    output: Path,
    before: Evaluation | None,
    after: Evaluation | None,
    form: dict[str, Any],
) -> RunResult:
    """Collect the measures, put them into the card and `metrics.json`. `form`: quantisation and bytes of the base, and what
    else was measured."""
    metrics: dict[str, Any] = {}
    for name in ("loss", "perplexity", "accuracy"):
        metrics[f"{name}_before"] = before.metrics[name] if before else None
        metrics[name] = after.metrics[name] if after else None
    end: dict[str, Any] = next((e for e in reversed(trainer.state.log_history) if "train_runtime" in e), {})
    metrics |= {
        "trainable_parameters": model.get_nb_trainable_parameters()[0],
        "file_bytes": sum(p.stat().st_size for p in output.glob("adapter_model.safetensors")),
        "seconds": end.get("train_runtime"),
        "tokens_per_second": end.get("train_tokens_per_second"),
        "peak_memory_bytes": end.get("peak_memory_bytes"),
    } | form
    if "seconds" in form:
        metrics["tokens_per_second"] = trainer.meter.tokens / form["seconds"] if form["seconds"] else 0.0
    samples = [
        {"prompt": p, "target": t, "before": b, "after": a}
        for p, t, b, a in zip(after.prompts, after.targets, before.outputs, after.outputs, strict=True)
    ][:SAMPLES] if before and after else []  # fmt: skip
    result = RunResult(output_dir=output, metrics=metrics, history=trainer.state.log_history, samples=samples)
    if not processes.is_first():
        return result
    shown = {CARD_NAMES[k]: v for k, v in metrics.items() if k in CARD_NAMES and v is not None}
    model.card_metrics.update(shown)
    model.create_or_update_model_card(output)
    write_text(
        output / METRICS_NAME, json.dumps(finite(asdict(result) | {"output_dir": str(output)}), indent=1, ensure_ascii=False)
    )
    return result


CARD_NAMES = {
    "loss_before": "held-out loss of the base", "loss": "held-out loss",
    "perplexity_before": "held-out perplexity of the base", "perplexity": "held-out perplexity",
    "accuracy_before": "held-out accuracy of the base", "accuracy": "held-out accuracy",
    "quantization": "base quantised to", "base_bytes": "base in memory, bytes",
}  # fmt: skip


def finite(value: Any) -> Any:
    """The value with infinities and NaN as None, which JSON cannot hold."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
