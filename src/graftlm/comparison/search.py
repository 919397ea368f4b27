"""Learning rates by successive halving (arXiv:1502.07943), all methods and rates together over one base.

Every method starts with five rates around its default. When a quarter of the time is over, the worse half of them, by the
loss on tuning rows, stops; at half of the time again; the best of the rest is chosen. Tuning rows are taken out of the rows
to train on, so that the held-out rows choose nothing.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from ..errors import ConfigError, GraftError
from .spec import MethodSpec, merged

if TYPE_CHECKING:
    from ..training import Outcome, Recipe
    from ..training.setup import RunData
    from .bases import Bases
    from .progress import Shown

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


class Method:
    """The candidates of one method, and the decisions between them."""

    def __init__(self, rates: list[float], until: list[float], rows: Any, tokenizer: Any) -> None:
        self.candidates = [Candidate(rate) for rate in rates]
        self.until, self.rows, self.tokenizer = until, rows, tokenizer
        self.decided: set[int] = set()

    def measure(self, candidate: Candidate, model: Any) -> None:
        from ..training.evaluation import is_encoder_decoder, loss_metrics

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
        found = [c for c in self.candidates if c.status in ("running", "finished") and c.losses]
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


def search(
    specs: list[MethodSpec],
    layers: dict[str, dict[str, Any]],
    seeds: Sequence[int],
    bases: Bases,
    budget: float,
    shown: Shown,
) -> dict[str, list[dict[str, Any]]]:
    """Learning rates of the rows that name none: by label, what was tried and what became of it ("chosen", "finished",
    "dropped", "failed").

    Args:
        layers: what holds for each row, as in `run.compare`.
        seeds: of the comparison; the search runs with the first, on rows that none of them holds out.
        budget: seconds for all of it.

    Raises:
        ConfigError: too few rows to take tuning rows from.
    """
    from ..training import Recipe, Together
    from ..training.together import common_parts
    from .progress import Work

    shown.doing("searching learning rates")
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        groups: dict[tuple, list[tuple[MethodSpec, Recipe]]] = {}
        for spec in specs:
            own = {"method": spec.method, "method_options": spec.options, "output_dir": str(Path(name) / spec.slug)}
            quick = {"eval_strategy": "no", "save_strategy": "no", "load_best": False, "seed": seeds[0]}
            try:
                recipe = Recipe.from_dict(merged(layers[spec.label], own, {"training": quick}))
            except GraftError:
                continue  # its row says so
            if recipe.training.learning_rate is None:
                groups.setdefault(common_parts(recipe), []).append((spec, recipe))
        methods = sum(len(g) for g in groups.values())
        for group in groups.values():
            base = bases.get(group[0][1].quantization)
            data = tuning(bases.data_of(group[0][1]), seeds[0], held_out(bases, group[0][1], seeds))
            now, share = time.perf_counter(), budget * len(group) / methods
            until = [now + part * share for part in (*RUNGS, 1.0)]
            together = Together(base.model, base.tokenizer, quiet=True)
            made = []
            for spec, recipe in group:
                method = Method([recipe.learning_rate * f for f in FACTORS], until, data.held_out_rows, base.tokenizer)
                made.append((spec, method))
                for candidate in method.candidates:
                    one = recipe.replace(
                        f"training.learning_rate={candidate.rate!r}", output_dir=f"{recipe.output_dir}-{candidate.rate:g}"
                    )
                    note = Noted(candidate)
                    together.add(
                        one, data=replace(data, held_out=None, held_out_rows=None),
                        callbacks=[Rungs(method, candidate), Work(shown)], done=note,
                    )  # fmt: skip
            together.run()
            for spec, method in made:
                best = method.chosen()
                if best is not None:
                    best.status = "chosen"
                    found[spec.label] = [entry(c) for c in method.candidates]
                    weak = "; too few to tell: give a larger budget" if best.steps < ENOUGH else ""
                    shown.say(f"learning rate of {spec.label}: {best.rate:g} (after {best.steps} steps{weak})")
    return found


class Noted:
    """Notes a candidate that failed."""

    def __init__(self, candidate: Candidate) -> None:
        self.candidate = candidate

    def __call__(self, outcome: Outcome) -> None:
        if outcome.error is not None:
            self.candidate.status = "failed"


def entry(candidate: Candidate) -> dict[str, Any]:
    loss = candidate.losses[-1] if candidate.losses else None
    return {"learning_rate": candidate.rate, "loss": loss, "steps": candidate.steps, "status": candidate.status}


def held_out(bases: Bases, recipe: Recipe, seeds: Sequence[int]) -> set[tuple[int, ...]]:
    """Token ids of the rows that the comparison holds out under any of its seeds (which may choose them)."""
    parts = [bases.data_of(recipe.replace(f"training.seed={seed}")).held_out_rows for seed in seeds]
    return {tuple(ids) for part in parts if part is not None for ids in part["input_ids"]}


def tuning(data: RunData, seed: int, forbidden: set[tuple[int, ...]]) -> RunData:
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
