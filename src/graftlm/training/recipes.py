"""Running a recipe: base and data in, a trained and measured adapter directory out.

    output_dir/
      adapter_config.json, adapter_model.safetensors, README.md    the adapter, as `save_pretrained` writes it
      recipe.yaml      the recipe with every default filled in
      metrics.json     measures before and after, the log, sample texts
      loss.png         the loss curve
      progress.jsonl   where asked for: what the run does while it goes (`live`)
      checkpoint-<n>/  what `resume` goes on from

The same recipe on the same machine gives the same adapter bit for bit, where products are made in the same ways (these are
chosen by timing, see `kernels.linear`; another choice rounds otherwise). Started by `torchrun` or `accelerate launch`, every
process trains on its share of each batch (`batch_size` rows a process), and the first one prints and saves
(docs/distributed.md).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from . import runs
from .arguments import training_arguments
from .bases import BaseModelError, resolve_base
from .evaluation import Evaluation
from .measuring import measure
from .output import RECIPE_NAME
from .results import RunResult
from .schema import DataSection, Recipe, TrainingSection
from .search import with_best_rate
from .setup import RunData
from .surroundings import only_the_first_speaks

__all__ = [
    "BaseModelError",
    "DataSection",
    "Recipe",
    "RunResult",
    "TrainingSection",
    "measure",
    "only_the_first_speaks",
    "recipe_of",
    "resolve_base",
    "run",
    "training_arguments",
]


def run(
    recipe: Recipe,
    *,
    model: Any = None,
    tokenizer: Any = None,
    callbacks: Sequence[TrainerCallback] = (),
    quiet: bool = False,
    baseline: Evaluation | None = None,
    member: Any = None,
    data: RunData | None = None,
    also: Callable[[Any, Any], dict[str, Any]] | None = None,
    progress: bool = False,
) -> RunResult:
    """Train the recipe's adapter, measure it and save it.

    Args:
        model, tokenizer: a loaded base to use in place of `recipe.base`; it is given back as it was (a quantised one
            prepared for training).
        callbacks: further Trainer callbacks.
        quiet: no progress bar and no lines.
        baseline: `measure(…)` of the plain base on the same held-out data, where it is known already.
        member: its place among several runs that train together (`together.Member`).
        data: the recipe's data, where it is loaded already.
        also: further measures of the trained model, given it and the tokenizer; they join the metrics.
        progress: write `progress.jsonl` into the output directory while it trains (`live`).

    Raises:
        RecipeError, DataError, ConfigError, BaseModelError: mistakes in the recipe.
        UnsupportedError: what the base, or this machine, cannot do.
        TrainingInterrupted: Ctrl-C; the adapter so far and a checkpoint are saved.
    """
    return runs.run(
        recipe, model=model, tokenizer=tokenizer, callbacks=callbacks, quiet=quiet, baseline=baseline, member=member,
        data=data, also=also, search=with_best_rate, progress=progress,
    )  # fmt: skip


def recipe_of(folder: str | os.PathLike) -> Recipe:
    """The recipe that an adapter directory was trained with."""
    return Recipe.from_yaml(Path(folder) / RECIPE_NAME)
