"""Learning rates by successive halving (arXiv:1502.07943), all methods and rates together over one base.

Every method starts with five rates around its default. When a quarter of the time is over, the worse half of them, by the
loss on tuning rows, stops; at half of the time again; the best of the rest is chosen. Tuning rows are taken out of the rows
to train on, so that the held-out rows choose nothing.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from .. import processes
from ..architectures import model_dims
from ..errors import ConfigError, UnsupportedError
from .evaluation import is_encoder_decoder, loss_metrics
from .trainer import TrainingInterrupted

if TYPE_CHECKING:
    from .schema import Recipe
    from .setup import RunData
    from .together import Outcome

FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)  # of the method's default rate
RUNGS = (0.25, 0.5)  # shares of the time at which the worse half stops
ENOUGH = 20  # steps after which a loss says something about a rate
SHARE, FEWEST = 0.2, 4  # tuning rows: their share, and how many there must be


@dataclass
class Candidate:
    """One rate of one method."""

    rate: float
    losses: list[float] = field(default_factory=list)
    steps: int = 0
    status: str = "running"

    def entry(self) -> dict[str, Any]:
        """What is kept of it."""
        loss = self.losses[-1] if self.losses else None
        return {"learning_rate": self.rate, "loss": loss, "steps": self.steps, "status": self.status}

    @property
    def doubt(self) -> str:
        """What to say of one that could train too little."""
        return "" if self.steps >= ENOUGH else f" (after {self.steps} steps, too few to tell: give a larger budget)"


class Method:
    """The candidates of one method, and the decisions between them."""

    def __init__(self, rates: list[float], until: list[float], rows: Any, tokenizer: Any) -> None:
        self.candidates = [Candidate(rate) for rate in rates]
        self.until, self.rows, self.tokenizer = until, rows, tokenizer
        self.decided: set[int] = set()

    def measure(self, candidate: Candidate, model: Any) -> None:
        loss = loss_metrics(model, self.tokenizer, self.rows, 32, is_encoder_decoder(model))["loss"]
        candidate.losses.append(loss if math.isfinite(loss) else math.inf)

    def decide(self, rung: int) -> None:
        """Stop the worse half, as soon as all that still run have been measured at this rung."""
        running = [c for c in self.candidates if c.status == "running"]
        if rung in self.decided or any(len(c.losses) <= rung for c in running):
            return
        self.decided.add(rung)
        for loser in sorted(running, key=lambda c: c.losses[rung])[math.ceil(len(running) / 2) :]:
            loser.status = "dropped"

    def chosen(self) -> Candidate | None:
        """The best of those that came furthest."""
        found = [c for c in self.candidates if c.status in ("running", "finished", "chosen") and c.losses]
        found = [c for c in found if math.isfinite(c.losses[-1])]
        default = self.candidates[len(self.candidates) // 2].rate
        return min(found, key=lambda c: (c.losses[-1], abs(math.log(c.rate / default))), default=None)


class Rungs(TrainerCallback):
    """Measures a candidate when a rung's time has come, and stops it when it has lost or the time is over."""

    def __init__(self, method: Method, candidate: Candidate) -> None:
        self.method, self.candidate = method, candidate

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        own, now = self.candidate, time.perf_counter()
        own.steps = state.global_step
        rung = len(own.losses)
        if rung < len(self.method.until) - 1 and now >= self.method.until[rung]:
            self.method.measure(own, model)
            self.method.decide(rung)
        if own.status == "dropped" or now >= self.method.until[-1]:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.candidate.status == "running":
            self.method.measure(self.candidate, model)
            self.candidate.status = "finished"


def searched(
    recipes: Sequence[tuple[str, Recipe]],
    model: Any,
    tokenizer: Any,
    data: RunData,
    seconds: float,
    callback: Callable[[], TrainerCallback] | None = None,
) -> dict[str, Method]:
    """Try five rates of each recipe over one base, all together; by name, how each went.

    Args:
        recipes: named, over the same base and data.
        data: what they train on, with tuning rows in the place of the held-out ones (`tuning`).
        seconds: for all of it.
        callback: a further callback for each run.
    """
    from .together import Together

    now = time.perf_counter()
    until = [now + part * seconds for part in (*RUNGS, 1.0)]
    together, found = Together(model, tokenizer, quiet=True), {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, recipe) in enumerate(recipes):
            dims = model_dims(model)
            own = recipe.filled(dims.hidden, len(data.train_rows), dims.layers)
            default = float(own.training.learning_rate or 0.0)
            method = found[name] = Method([default * f for f in FACTORS], until, data.held_out_rows, tokenizer)
            for candidate in method.candidates:
                place = str(Path(folder) / f"{number}-{candidate.rate:g}")
                together.add(
                    own.replace(**quick(own, candidate.rate), output_dir=place, overwrite=False, resume=False),
                    data=replace(data, held_out=None, held_out_rows=None),
                    callbacks=[Rungs(method, candidate), *([callback()] if callback is not None else [])],
                    done=Noted(method, candidate),
                )  # fmt: skip
        together.run()
    for method in found.values():
        if (best := method.chosen()) is not None:
            best.status = "chosen"
    return found


def quick(recipe: Recipe, rate: float) -> dict[str, Any]:
    """The training part of a trial: this rate, nothing saved, nothing measured but by the search."""
    left_out = {"eval_strategy": "no", "save_strategy": "no", "load_best": False, "early_stopping": None}
    return {"training": recipe.training.model_dump() | left_out | {"learning_rate": rate}}


def with_best_rate(recipe: Recipe, model: Any, tokenizer: Any, data: RunData, say: Callable[[str], None]) -> Recipe:
    """The recipe with the learning rate that a search of `training.budget` seconds finds, on rows taken out of the training
    rows.

    Raises:
        ConfigError: too few rows, or no rate gave a finite loss.
        UnsupportedError: several processes.
    """
    if processes.count() > 1:
        raise UnsupportedError(
            f"a search of the learning rate (--budget, training.learning_rate: search) runs in one process, and "
            f"{processes.count()} were started (torchrun, accelerate launch). Search in one process first, then name "
            "training.learning_rate."
        )
    start = recipe.replace(training=recipe.training.model_dump() | {"learning_rate": None})
    say(f"Searching the learning rate for {recipe.training.budget:g} seconds.")
    try:
        method = searched([("run", start)], model, tokenizer, tuning(data, recipe.training.seed), recipe.training.budget)[
            "run"
        ]
    except TrainingInterrupted:
        raise KeyboardInterrupt("stopped in the search of the learning rate; nothing was trained yet") from None
    best = method.chosen()
    if best is None:
        tried = ", ".join(f"{c.rate:g}" for c in method.candidates)
        raise ConfigError(f"no learning rate of {tried} gave a finite loss; name training.learning_rate.")
    say(f"Learning rate {best.rate:g}{best.doubt}, out of {', '.join(f'{c.rate:g}' for c in method.candidates)}.")
    return recipe.replace(training=recipe.training.model_dump() | {"learning_rate": best.rate})


class Noted:
    """Notes a candidate that failed."""

    def __init__(self, method: Method, candidate: Candidate) -> None:
        self.method, self.candidate = method, candidate

    def __call__(self, outcome: Outcome) -> None:
        if outcome.error is not None:
            self.candidate.status = "failed"
            for rung in range(len(RUNGS)):  # the others may have waited for it
                self.method.decide(rung)


def tuning(data: RunData, seed: int, forbidden: Collection[tuple[int, ...]] = ()) -> RunData:
    """The rows to train on without the forbidden ones, a part of them taken out and in the place of the held-out rows."""
    kept = [i for i, ids in enumerate(data.train_rows["input_ids"]) if tuple(ids) not in forbidden]
    if len(kept) < 2 * FEWEST:
        raise ConfigError(
            f"{len(kept)} rows to train on are too few to search learning rates with (at least {2 * FEWEST}); leave budget "
            "out and name training.learning_rate, or go with the defaults."
        )
    size = max(FEWEST, round(SHARE * len(kept)))
    parts = data.train_rows.select(kept).train_test_split(test_size=size, seed=seed)
    return replace(data, train_rows=parts["train"], held_out_rows=parts["test"])
