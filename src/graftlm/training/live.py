"""`progress.jsonl`: what a run does while it goes, a line of JSON an event, for programs that watch.

    {"event": "begin", "step": 0, "steps": 130, "epochs": 10, "time": …}
    {"event": "step", "step": 12, "loss": 3.1, "tokens_per_second": 270.0, "memory": 7e8, "seconds": 4.2}
    {"event": "evaluation", "step": 13, "epoch": 1.0, "loss": 2.9, "accuracy": null, "samples": [{"prompt": …, …}]}
    {"event": "end", "step": 130}

Losses are nats a labelled token: a step's is the mean since the line before. Lines become rarer the longer a run takes, so
that a file has some thousands at most. A run that resumes goes on in the file, from the step that it resumes at.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .meters import EpochMeter, TokenLoss, memory_now
from .output import write_text
from .results import finite

PROGRESS_NAME = "progress.jsonl"
PAUSE, SHARE = 0.25, 1 / 1000  # seconds between lines at least, and as a share of the time that has passed


class ProgressFile(TrainerCallback):
    """Writes the file.

    Args:
        folder: where it goes.
        meter: the trainer's, which comes before it among the callbacks.
        samples: gives texts at each evaluation: [{"prompt": …, "target": …, "text": …}, …].
    """

    def __init__(self, folder: Path, meter: EpochMeter, samples: Callable[[], list[dict[str, str]]] = list) -> None:
        self.path, self.meter, self.samples = folder / PROGRESS_NAME, meter, samples
        self.since = TokenLoss()
        self._seen = (0.0, 0)
        self._started = self._wrote = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = self._wrote = time.monotonic()
        self._seen = self.meter.loss.total, self.meter.loss.tokens
        write_text(self.path, "".join(f"{line}\n" for line in self._kept(state.global_step)))
        self._write("begin", state, steps=state.max_steps, epochs=args.num_train_epochs, time=time.time())

    def _kept(self, step: int) -> list[str]:
        """Lines of a run before, up to the step that this one begins at; a line that was cut off is left out."""
        if not step or not self.path.exists():
            return []
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if found["event"] != "end" and found["step"] <= step:
                kept.append(line)
        return kept

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        total, tokens = self.meter.loss.total, self.meter.loss.tokens
        seen = self._seen if tokens >= self._seen[1] else (0.0, 0)  # an epoch's sums start anew
        self.since.total, self.since.tokens = self.since.total + total - seen[0], self.since.tokens + tokens - seen[1]
        self._seen = total, tokens
        now = time.monotonic()
        if now - self._wrote < max(PAUSE, SHARE * (now - self._started)) and state.global_step < state.max_steps:
            return
        self._wrote = now
        self._write(
            "step", state, loss=self.since.mean, tokens_per_second=self.meter.tokens_per_second, memory=memory_now(),
            seconds=now - self._started,
        )  # fmt: skip
        self.since = TokenLoss()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        found = metrics or {}
        self._write(
            "evaluation", state, epoch=state.epoch, loss=found.get("eval_loss"), accuracy=found.get("eval_accuracy"),
            samples=self.samples(),
        )  # fmt: skip

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write("end", state)

    def _write(self, event: str, state: Any, **values: Any) -> None:
        if not state.is_world_process_zero:
            return
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(finite({"event": event, "step": state.global_step} | values), ensure_ascii=False) + "\n")
