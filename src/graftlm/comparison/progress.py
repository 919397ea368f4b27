"""What a comparison shows while it runs: a bar over all steps, and a line for every run that has ended."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from .result import DONE
from .wording import number

if TYPE_CHECKING:
    from .result import MethodRun


class Steps(TrainerCallback):
    """Moves the bar with the steps of one run."""

    def __init__(self, shown: Shown) -> None:
        self.shown = shown
        self.counted = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.counted = state.max_steps
        self.shown.more(state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.counted -= 1
        self.shown.forward(1)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.shown.more(-self.counted)  # stopped early
        self.counted = 0


class Shown:
    """Progress of a comparison, on stderr; silent with `quiet`."""

    def __init__(self, quiet: bool, console: Console | None, runs: int) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.quiet, self.runs, self.finished = quiet, runs, 0
        self.start = time.perf_counter()
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console, transient=True, disable=quiet)
        self.task = self.bar.add_task("training together", total=None)

    def __enter__(self) -> Shown:
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def steps(self) -> Steps:
        """A callback for a run."""
        return Steps(self)

    def more(self, steps: int) -> None:
        total = (self.bar.tasks[0].total or 0) + steps
        self.bar.update(self.task, total=total)

    def forward(self, steps: int) -> None:
        self.bar.update(self.task, advance=steps)

    def say(self, text: str) -> None:
        if not self.quiet:
            self.bar.console.print(text)

    def ended(self, run: MethodRun) -> None:
        """A line for a run."""
        self.finished += 1
        head = f"[bold cyan]{self.finished}/{self.runs}[/] [bold]{escape(run.label)}[/] (seed {run.seed})"
        if run.status == DONE:
            self.say(f"{head}  loss {number(run.metrics.get('loss'))}")
        else:
            self.say(f"{head}  [red]{run.status}[/]: {escape(run.error or '')}")
