"""Learning rates of a comparison's rows, searched before it (see `training.search`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import GraftError
from .progress import Shown, Work
from .spec import MethodSpec, merged

if TYPE_CHECKING:
    from ..training import Recipe
    from .bases import Bases


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
    from ..training.search import searched, tuning

    shown.doing("searching learning rates")
    found: dict[str, list[dict[str, Any]]] = {}
    groups = searching(specs, layers, seeds)
    methods = sum(len(g) for g in groups.values())
    for group in groups.values():
        first = group[0][1]
        base = bases.get(first.quantization)
        data = tuning(bases.data_of(first), seeds[0], held_out(bases, first, seeds))
        share = budget * len(group) / methods
        made = searched(group, base.model, base.tokenizer, data, share, lambda: Work(shown))
        for label, method in made.items():
            best = method.chosen()
            if best is not None:
                found[label] = [c.entry() for c in method.candidates]
                shown.say(f"learning rate of {label}: {best.rate:g}{best.doubt}")
    return found


def searching(
    specs: Sequence[MethodSpec], layers: dict[str, dict[str, Any]], seeds: Sequence[int]
) -> dict[tuple, list[tuple[str, Recipe]]]:
    """The rows whose rates are searched, with their recipes, by what they must share to train together."""
    from ..training import Recipe
    from ..training.together import common_parts

    groups: dict[tuple, list[tuple[str, Recipe]]] = {}
    for spec in specs:
        own = {"method": spec.method, "method_options": spec.options, "training": {"seed": seeds[0]}}
        try:
            recipe = Recipe.from_dict(merged(layers[spec.label], own))
        except GraftError:
            continue  # its row says so
        if recipe.training.learning_rate is None:
            groups.setdefault(common_parts(recipe), []).append((spec.label, recipe))
    return groups


def held_out(bases: Bases, recipe: Recipe, seeds: Sequence[int]) -> set[tuple[int, ...]]:
    """Token ids of the rows that the comparison holds out under any of its seeds (which may choose them)."""
    parts = [bases.data_of(recipe.replace(f"training.seed={seed}")).held_out_rows for seed in seeds]
    return {tuple(ids) for part in parts if part is not None for ids in part["input_ids"]}
