"""What a comparison shows while it runs: a bar over all its work with the time left, and a line for each run that ended.

Work is counted in passes of a row: three for a row in training (forward, and twice as much backward), two for a held-out row
(its loss, and an answer).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text
from transformers import TrainerCallback

from .findings import DONE
from .wording import duration, number, percent

if TYPE_CHECKING:
    from .findings import MethodRun


TRAINING, MEASURING = 3, 2


class Work(TrainerCallback):
    """The work of one run, which moves the bar: its steps, and the measuring at its end.

    Args:
        planned: passes of all its training, as far as they are known before (0: not at all).
        measuring: passes of the measuring.
    """

    def __init__(self, shown: Shown, planned: float = 0, measuring: float = 0) -> None:
        self.shown, self.left, self.measuring = shown, planned, measuring
        self.each = 1.0
        shown.more(planned + measuring)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.each = TRAINING * args.per_device_train_batch_size * args.gradient_accumulation_steps
        self.expect(state.max_steps * self.each)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.left -= self.each
        self.shown.forward(self.each)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.expect(0)  # stopped early

    def expect(self, passes: float) -> None:
        """So much training is left, not what was thought."""
        self.shown.more(passes - self.left)
        self.left = passes

    def ended(self) -> None:
        """It is measured, or has failed."""
        self.expect(0)
        self.shown.forward(self.measuring)
        self.measuring = 0


class TimeLeft(ProgressColumn):
    """Time left, if the rest goes as what is done (work comes in jumps, so the last moments' speed says little)."""

    def render(self, task: Task) -> Text:
        if not task.total or not task.completed or task.elapsed is None:
            return Text("")
        seconds = task.elapsed * max(task.total - task.completed, 0) / task.completed
        return Text(f"about {duration(seconds)} left", style="progress.remaining")


class Shown:
    """Progress of a comparison, on stderr; silent with `quiet`."""

    def __init__(self, quiet: bool, console: Console | None, runs: int) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.quiet, self.runs, self.finished = quiet, runs, 0
        self.start = time.perf_counter()
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeLeft())
        self.bar = Progress(*columns, console=self.console, transient=True, disable=quiet)
        self.task = self.bar.add_task("starting", total=None)

    def __enter__(self) -> Shown:
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def doing(self, what: str) -> None:
        """What is done now."""
        self.bar.update(self.task, description=what)

    def more(self, passes: float) -> None:
        total = (self.bar.tasks[0].total or 0) + passes
        self.bar.update(self.task, total=total)

    def forward(self, passes: float) -> None:
        self.bar.update(self.task, advance=passes)

    def say(self, text: str) -> None:
        if not self.quiet:
            self.bar.console.print(text)

    def ended(self, run: MethodRun) -> None:
        """A line for a run."""
        self.finished += 1
        head = f"[bold cyan]{self.finished}/{self.runs}[/] [bold]{escape(run.label)}[/] (seed {run.seed})"
        if run.status == DONE:
            accuracy = run.metrics.get("accuracy")
            right = "" if accuracy is None else f", {percent(accuracy)} right"
            self.say(f"{head}  loss {number(run.metrics.get('loss'))}{right}")
        else:
            self.say(f"{head}  [red]{run.status}[/]: {escape(run.error or '')}")
