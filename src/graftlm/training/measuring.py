"""The measures of a recipe's held-out data."""

from __future__ import annotations

from typing import Any

from .evaluation import Evaluation, answers, evaluation, is_encoder_decoder
from .schema import Recipe
from .setup import RunData, load_data_of

SAMPLES = 5
SAMPLE_TOKENS = 40


def measure(recipe: Recipe, model: Any, tokenizer: Any, data: RunData | None = None) -> Evaluation | None:
    """Loss and (for label tasks) accuracy on the recipe's held-out data, and generated texts of at least its first rows.

    None where the recipe holds out nothing.
    """
    data = data or load_data_of(recipe, tokenizer, is_encoder_decoder(model))
    if data.held_out is None:
        return None
    found = evaluation(
        model, tokenizer, data.held_out, data.format, batch_size=recipe.training.eval_batch_size,
        truncation=recipe.data.truncation,
    )  # fmt: skip
    if found.outputs:
        return found
    rows = data.sample_rows(SAMPLES, tokenizer, is_encoder_decoder(model))
    if rows is None:
        return found
    outputs = answers(model, tokenizer, rows, data.format, recipe.training.eval_batch_size, SAMPLE_TOKENS)
    return Evaluation(
        metrics=found.metrics, prompts=tuple(rows["prompt"]), targets=tuple(rows["target"]), outputs=tuple(outputs)
    )
