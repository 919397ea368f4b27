"""Changes of a recipe that make a run fit, the cheapest in time and quality first, each with its own plan."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import GraftError, PlanError
from ..training.schema import Recipe
from .whole import Plan, plan


@dataclass(frozen=True)
class Mend:
    """What to change, the entries of the recipe, and the plan of the changed run."""

    what: str
    overrides: tuple[str, ...]
    plan: Plan


def changes(planned: Plan) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What may be changed of a recipe, and by which overrides, the cheapest first."""
    recipe, rows = planned.recipe, planned.rows
    t, size = recipe.training, recipe.training.batch_size or 1
    if not t.packing:
        for factor in (n for n in (2, 4, 8, 16) if size >= n):
            entries = f"training.batch_size={size // factor}", f"training.accumulation={t.accumulation * factor}"
            yield f"{size // factor} rows at a time, {factor} times an update", entries
        tokens = max(rows["longest"], 16)
        if tokens < size * rows["longest"]:
            yield "packing", ("training.packing=true", f"training.tokens={tokens}")
    elif t.tokens // 2 >= max(rows["longest"], 16):
        yield "half the tokens a step", (f"training.tokens={t.tokens // 2}", f"training.accumulation={2 * t.accumulation}")
    if t.eval_batch_size > 1:
        yield "fewer rows in evaluations", (f"training.eval_batch_size={max(t.eval_batch_size // 8, 1)}",)
    if not t.gradient_checkpointing:
        yield "activation checkpointing every 2 blocks", ("training.gradient_checkpointing=2",)
        yield "activation checkpointing", ("training.gradient_checkpointing=true",)
    if recipe.quantization is None:
        if recipe.dtype == "fp32":
            yield "the base in bf16", ("dtype=bf16",)
        if importlib.util.find_spec("bitsandbytes"):
            yield "the base in int8", ("quantization=int8",)
            yield "the base in NF4", ("quantization=nf4",)
    rank = recipe.method_options.get("r")
    if isinstance(rank, int) and rank > 1:
        yield f"rank {rank // 2}", (f"method_options.r={rank // 2}",)
    if rows["longest"] > 32:
        yield f"rows of at most {rows['longest'] // 2} tokens", (f"data.max_length={rows['longest'] // 2}",)


def mends(recipe: Recipe, planned: Plan, settings: dict[str, Any]) -> list[Mend]:
    """Each change alone, as far as the first one that fits; where none does, one after another put together until it fits.

    Args:
        planned: the recipe's own plan, which does not fit.
        settings: of `plan`: device, rows, length, config, say.
    """
    found: list[Mend] = []
    for what, entries in changes(planned):
        mended = tried(recipe, what, entries, settings)
        found += [mended] if mended and mended.plan.peak_bytes < planned.peak_bytes else []
        if mended and mended.plan.fits:
            return found
    # later entries of the same kind take the place of earlier ones
    put: dict[str, str] = {}
    for one in list(found):
        put |= {text.partition("=")[0]: text for text in one.overrides}
        if put.get("training.packing"):
            put.pop("training.batch_size", None)
            put.pop("training.accumulation", None)
        if put.get("quantization"):
            put.pop("dtype", None)
        mended = tried(recipe, "all of these as far as " + one.what, tuple(put.values()), settings)
        if mended and mended.plan.fits:
            return [*found, mended]
    return found


def tried(recipe: Recipe, what: str, entries: tuple[str, ...], settings: dict[str, Any]) -> Mend | None:
    """A change with its plan; None where the base, method or data does not allow it."""
    own = dict(settings)
    cut = next((e for e in entries if e.startswith("data.max_length=")), None)
    if cut and own.get("length"):
        own["length"] = min(own["length"], int(cut.partition("=")[2]))
    try:
        return Mend(what, entries, plan(recipe.replace(*entries), **own))
    except GraftError:
        return None


def fitting(found: list[Mend]) -> Mend:
    """The first change that makes the run fit. PlanError: none does."""
    chosen = next((m for m in found if m.plan.fits), None)
    if chosen is None:
        raise PlanError("no change that is known makes this run fit: take a smaller base, or a machine with more memory")
    return chosen
