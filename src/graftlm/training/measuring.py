"""The measures of a recipe's held-out data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import RecipeError
from .evaluation import LABEL_FORMAT, Evaluation, answers, evaluation, is_encoder_decoder
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


def samples_of(
    model: Any, tokenizer: Any, data: RunData, count: int = 2, tokens: int = 24
) -> Callable[[], list[dict[str, str]]]:
    """What gives short greedy answers of the model, as it is when it is called, to the first held-out rows."""
    rows = None if data.held_out is None else data.sample_rows(count, tokenizer, is_encoder_decoder(model))

    def made() -> list[dict[str, str]]:
        if rows is None:
            return []
        texts = answers(model, tokenizer, rows, data.format, count, tokens)
        return [{"prompt": p, "target": t, "text": a} for p, t, a in zip(rows["prompt"], rows["target"], texts, strict=True)]

    return made


def check_baseline(baseline: Evaluation, data: RunData, tokenizer: Any, seq2seq: bool) -> None:
    """RecipeError where a baseline was measured on other held-out rows than the run's, or written out in another format."""
    mend = "Give what measure(…) gave on this recipe's data, or leave baseline out: it is then measured."
    if data.held_out is None:
        raise RecipeError(f"baseline was given, but the recipe holds out no rows that it could be compared on. {mend}")
    rows = data.sample_rows(SAMPLES, tokenizer, seq2seq)
    prompts = list(rows["prompt"]) if rows is not None else []
    count = len(data.held_out) if data.format.name == LABEL_FORMAT else len(prompts)
    measured = baseline.metrics["examples"], len(baseline.prompts)
    if measured != (len(data.held_out), count):
        raise RecipeError(
            f"baseline was measured on {measured[0]} held-out rows, with answers to {measured[1]} of them; this recipe's "
            f"data has {len(data.held_out)}, with answers to {count}. {mend}"
        )
    shown = [prompt for prompt in baseline.prompts if prompt.strip()][: len(prompts)]
    for had, has in zip(shown, prompts, strict=True):
        if had != has:
            raise RecipeError(f"baseline was measured on other held-out rows: {had!r} stands where {has!r} does now. {mend}")
