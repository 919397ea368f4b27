"""Training and evaluation: a trainer on transformers' own, recipes that run from one file, measures on held-out data.

from graftlm.training import Recipe, run

result = run(Recipe.from_yaml("recipe.yaml"))
print(result.metrics["loss_before"], result.metrics["loss"])
"""

from __future__ import annotations

from .trainer import Trainer, TrainingInterrupted

__all__ = ["Trainer", "TrainingInterrupted"]
