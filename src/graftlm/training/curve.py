"""The loss curve as a picture, out of a Trainer's `log_history`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CURVE_NAME = "loss.png"
SERIES = (
    ("loss", "training", "#9ecae1"),
    ("epoch_train_loss", "training, by epoch", "#3182bd"),
    ("eval_loss", "held out", "#e6550d"),
)
# Edges of the axes in the figure: a layout that matplotlib works out draws everything twice.
PLACE = {"left": 0.125, "right": 0.98, "bottom": 0.125, "top": 0.93}


def points(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one key of the log."""
    found = [(int(entry.get("step", 0)), float(entry[key])) for entry in history if key in entry]
    return [step for step, _ in found], [value for _, value in found]


def save_curve(history: Sequence[Mapping[str, Any]], folder: str | os.PathLike, title: str = "") -> Path | None:
    """Draw training and held-out loss (nats a token) over steps into `folder/loss.png`; None where nothing was logged."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [(label, colour, *points(history, key)) for key, label, colour in SERIES]
    if not any(steps for _, _, steps, _ in lines):
        return None
    figure = Figure(figsize=(6.4, 4), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(gridspec_kw=PLACE)
    for label, colour, steps, values in lines:
        if steps:
            axes.plot(steps, values, label=label, color=colour, marker="o" if len(steps) < 30 else None, markersize=3)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    path = Path(folder) / CURVE_NAME
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)
    return path
