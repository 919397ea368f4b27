"""What to say of a run that ends no better than its base, or no better than one constant answer: the likeliest reason, and
its mend."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from .meters import IGNORE_INDEX

if TYPE_CHECKING:
    from .evaluation import Evaluation
    from .schema import Recipe
    from .setup import RunData

GAIN = 0.01  # share of the base's loss under which a run has not become better
FEW = 50  # updates
CUT = 0.2  # share of the rows
FAR = 30  # times the usual rate, or of it one in so many


def note(
    recipe: Recipe, data: RunData, before: Evaluation | None, after: Evaluation | None, history: list[dict[str, Any]],
    usual: float,
) -> str | None:  # fmt: skip
    """One sentence or two, or None where the run has learnt something (or nothing was held out).

    Args:
        usual: the learning rate that the recipe would have by default.
    """
    if before is None or after is None:
        return None
    worse = verdict(before, after)
    return None if worse is None else f"{worse} {reason(recipe, data, before, after, history, usual)}"


def verdict(before: Evaluation, after: Evaluation) -> str | None:
    """How the run is no better, if it is not."""
    loss, start = after.metrics["loss"], before.metrics["loss"]
    if not math.isfinite(loss) or loss > start * (1 - GAIN):
        return f"The adapter is no better than the base: held-out loss {start:.3f} before, {loss:.3f} after."
    accuracy = after.metrics["accuracy"]
    if accuracy is None or not after.targets:
        return None
    answer, times = Counter(t.strip() for t in after.targets).most_common(1)[0]
    constant = times / len(after.targets)
    if accuracy > max(constant, before.metrics["accuracy"] or 0.0):
        return None
    return f"The adapter answers {accuracy:.0%} of the held-out rows rightly; always {answer!r} would be {constant:.0%}."


def reason(
    recipe: Recipe, data: RunData, before: Evaluation, after: Evaluation, history: list[dict[str, Any]], usual: float
) -> str:
    """The likeliest reason, and what to change."""
    rate = float(recipe.training.learning_rate or 0.0)
    losses = [e["loss"] for e in history if "loss" in e]
    updates = max((e.get("step", 0) for e in history), default=0)
    first, last = (losses[0], losses[-1]) if losses else (math.nan, math.nan)
    unlabelled, longest = cut_off(data)
    if unlabelled > CUT:
        return (
            f"{unlabelled:.0%} of the training rows have no labelled token: what is to be learnt is cut off at {longest} "
            "tokens. Raise data.max_length (graftlm data show prints what is trained)."
        )
    if losses and (not math.isfinite(last) or last > 1.1 * min(losses[: len(losses) // 2 + 1])):
        return (
            f"The training loss rose from {min(losses):.3g} to {last:.3g}: the learning rate {rate:g} is too high. Try "
            f"training.learning_rate={rate / 5:g}, or let it be searched (--budget 2m)."
        )
    start = before.metrics["loss"]
    if rate > FAR * usual or last > 1.1 * start:
        return (
            f"The training loss is {last:.3g}: the learning rate {rate:g} is too high. Leave training.learning_rate out "
            f"(here {usual:g}), or let it be searched (--budget 2m)."
        )
    if rate < usual / FAR:
        return (
            f"The learning rate {rate:g} is too low: leave training.learning_rate out (here {usual:g}), or let it be "
            "searched (--budget 2m)."
        )
    if updates < FEW:
        return f"It made {updates} updates only: raise training.epochs (or lower training.batch_size)."
    if last < 0.5 * after.metrics["loss"]:
        return (
            f"The training loss is {last:.3g}, so it has learnt its rows by heart: fewer training.epochs, more rows, or "
            "held-out rows of another kind than those to train on."
        )
    if last > 0.8 * first:
        return (
            f"The training loss hardly moved ({first:.3g} to {last:.3g}): the learning rate {rate:g} is too low for "
            f"{updates} updates. Try training.learning_rate={rate * 5:g}, or let it be searched (--budget 2m)."
        )
    return (
        "The training loss fell, so training works: look whether prompt and answer are what you mean (graftlm data show), "
        "and give it more epochs or rows."
    )


def cut_off(data: RunData) -> tuple[float, int]:
    """The share of training rows without a labelled token, and the longest row in tokens."""
    rows = data.train_rows["labels"]
    empty = sum(all(label == IGNORE_INDEX for label in row) for row in rows)
    return empty / max(len(rows), 1), max((len(row) for row in rows), default=0)
