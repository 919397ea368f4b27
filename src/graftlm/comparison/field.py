"""The runs of a comparison that train over one form of the base, and what becomes of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import DataError, GraftError
from .bases import Bases
from .findings import DONE, FAILED, INTERRUPTED, WAITING, MethodRun
from .general import General
from .progress import MEASURING, TRAINING, Shown, Work
from .result import ComparisonResult

if TYPE_CHECKING:
    from ..training import Outcome, Recipe


class Field:
    """The runs of one comparison that train over one form of the base."""

    def __init__(self, result: ComparisonResult, bases: Bases, general: General | None, at_once: int, shown: Shown) -> None:
        self.result, self.bases, self.general, self.at_once, self.shown = result, bases, general, at_once, shown
        self.work: dict[int, Work] = {}
        self.measuring = 0.0

    def plan(self, recipes: dict[int, Recipe]) -> None:
        """Count the work of all runs before the first one starts."""
        loaded = next((r for r in recipes.values() if r.quantization == self.bases.main), None)
        rows = self.bases.data_of(loaded) if loaded is not None else None
        self.measuring = MEASURING * len(rows.held_out) if rows is not None and rows.held_out is not None else 0.0
        for number, recipe in recipes.items():
            many = len(rows.train_rows) if rows is not None else 0
            t = recipe.filled(1, many).training
            count = t.max_steps * (t.batch_size or 1) * t.accumulation if t.max_steps else (t.epochs or 1) * many
            self.work[id(self.result.runs[number])] = Work(self.shown, TRAINING * count, self.measuring)
        forms = {(recipe.quantization, recipe.training.seed) for recipe in recipes.values()}
        self.shown.more(len(forms) * self.measuring)

    def baseline(self, recipe: Recipe) -> Any:
        """The plain base on the held-out rows."""
        known = len(self.bases.measured)
        self.shown.doing(f"measuring the base{f' in {recipe.quantization}' if recipe.quantization else ''}")
        found = self.bases.measure(recipe, self.result, self.general)
        self.shown.forward((len(self.bases.measured) - known) * self.measuring)
        return found

    def train(self, runs: list[tuple[MethodRun, Recipe]]) -> bool:
        """Train and measure them together; what goes wrong is noted in a run, unless it concerns all. False after Ctrl-C."""
        from ..training import Together, TrainingInterrupted

        scheme = runs[0][1].quantization
        try:
            base = self.bases.get(scheme)
            baselines = [self.baseline(recipe) for _, recipe in runs]
        except DataError:  # it concerns all
            raise
        except (GraftError, RuntimeError, ValueError, OSError) as error:
            for run, _ in runs:
                run.status, run.error = FAILED, f"{type(error).__name__}: {error}"
                self.work[id(run)].ended()
                self.shown.ended(run)
            return True
        self.shown.doing("training together" if len(runs) > 1 else f"training {runs[0][0].label}")
        together = Together(base.model, base.tokenizer, at_once=self.at_once, quiet=True)
        also = self.general.measure if self.general is not None else None
        for (run, recipe), baseline in zip(runs, baselines, strict=True):
            together.add(
                self.placed(recipe), baseline=baseline, data=self.bases.data_of(recipe), also=also,
                callbacks=[self.work[id(run)]], done=partial(self.note, run),
            )  # fmt: skip
        try:
            together.run()
        except (KeyboardInterrupt, TrainingInterrupted):
            waiting = [run for run, _ in runs if run.status == WAITING]
            for run in waiting[: not self.result.interrupted]:
                run.status, run.error = INTERRUPTED, "stopped by Ctrl-C"
            return False
        finally:
            self.bases.renew(scheme)
        return True

    def placed(self, recipe: Recipe) -> Recipe:
        """A run's recipe, which takes its folder as it is now."""
        return recipe.replace(overwrite=True)

    def note(self, run: MethodRun, outcome: Outcome) -> None:
        """What became of a run."""
        if isinstance(outcome.error, KeyboardInterrupt):
            run.status, run.error = INTERRUPTED, "stopped by Ctrl-C"
        elif outcome.error is not None:
            run.status, run.error = FAILED, f"{type(outcome.error).__name__}: {outcome.error}"
        elif outcome.result is not None:
            found = outcome.result
            run.recipe = (found.output_dir / "recipe.yaml").read_text(encoding="utf-8")
            run.metrics, run.history, run.samples = dict(found.metrics), list(found.history), list(found.samples)
            run.metrics["general_loss_before"] = self.bases.general.get(run.quantization)
            run.quantization = found.metrics.get("quantization")
            run.status, run.error = judged(found.metrics)
        self.result.seconds = self.shown.seconds
        self.result.save()
        self.work[id(run)].ended()
        self.shown.ended(run)


def judged(metrics: Mapping[str, Any]) -> tuple[str, str | None]:
    """Status and error of a run that came to its end: a loss that is no number is a failure."""
    loss = metrics.get("loss")
    if loss is None:
        return FAILED, "no held-out loss was measured; does the data have held-out rows (data.eval_split)?"
    if not math.isfinite(loss):
        return FAILED, f"the held-out loss is {loss}: training diverged; lower training.learning_rate"
    return DONE, None
