"""Progress of a training run: a rich bar with loss and time left in a terminal, plain lines elsewhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

SHOWN = (
    ("loss", "loss"), ("epoch_train_loss", "train loss"), ("epoch_train_perplexity", "ppl"), ("eval_loss", "eval loss"),
    ("eval_perplexity", "ppl"), ("eval_accuracy", "accuracy"), ("train_tokens_per_second", "tokens/s"),
)  # fmt: skip


def line(logs: dict[str, Any]) -> str:
    """The measures of a log entry in words; empty where none is for people."""
    parts = [f"{label} {logs[key]:.4g}" for key, label in SHOWN if isinstance(logs.get(key), (int, float))]
    return "  ".join(parts)


class RichProgress(TrainerCallback):
    """Takes the place of the Trainer's tqdm bar and of its printed dictionaries.

    Args:
        console: where to; standard error by default.
        bar: False for lines only; None draws a bar where the console is a terminal.
    """

    def __init__(self, console: Console | None = None, bar: bool | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.bar = self.console.is_terminal if bar is None else bar
        self.progress: Progress | None = None
        self.task: Any = None
        self.evaluation: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()
        if not (state.is_world_process_zero and self.bar):
            return
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        self.progress = Progress(*columns, console=self.console, transient=True)
        self.progress.start()
        self.task = self.progress.add_task("train", total=state.max_steps, completed=state.global_step, loss="-")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any) -> None:
        if self.progress is None:
            return
        if self.evaluation is None:
            total = len(eval_dataloader) if hasattr(eval_dataloader, "__len__") else None
            self.evaluation = self.progress.add_task("eval", total=total, loss="-")
        self.progress.advance(self.evaluation)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end_evaluation()

    on_predict = on_evaluate

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if self.progress is not None and "loss" in logs:
            self.progress.update(self.task, loss=f"{logs['loss']:.4g}")
        is_step = "loss" in logs and self.progress is not None
        text = line(logs)
        if state.is_world_process_zero and text and not is_step:
            epochs = (
                f"epoch {logs.get('epoch', state.epoch or 0):.4g}/{args.num_train_epochs:g}" if args.max_steps <= 0 else ""
            )
            self.console.print(
                f"step {state.global_step}/{state.max_steps} {epochs}  {text}", highlight=False, soft_wrap=True
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def _end_evaluation(self) -> None:
        if self.progress is not None and self.evaluation is not None:
            self.progress.remove_task(self.evaluation)
        self.evaluation = None

    def close(self) -> None:
        """Take the bar off the screen."""
        self._end_evaluation()
        if self.progress is not None:
            self.progress.stop()
        self.progress = None
