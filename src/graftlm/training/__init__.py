"""Training and evaluation: a trainer on transformers' own, recipes that run from one file, measures on held-out data.

from graftlm.training import Recipe, run

result = run(Recipe.from_yaml("recipe.yaml"))
print(result.metrics["loss_before"], result.metrics["loss"])
"""

from __future__ import annotations

from .callbacks import RankSchedule
from .compiling import CompiledLayers
from .evaluation import Evaluation, evaluate, evaluation, generate_texts
from .recipes import BaseModelError, Recipe, RunResult, measure, recipe_of, resolve_base, run
from .together import Outcome, Together, train_together
from .trainer import Trainer, TrainingInterrupted

__all__ = [
    "BaseModelError",
    "CompiledLayers",
    "Evaluation",
    "Outcome",
    "RankSchedule",
    "Recipe",
    "RunResult",
    "Together",
    "Trainer",
    "TrainingInterrupted",
    "evaluate",
    "evaluation",
    "generate_texts",
    "measure",
    "recipe_of",
    "resolve_base",
    "run",
    "train_together",
]
