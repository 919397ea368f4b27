"""The plan of a run: parameters, files, memory by kind, time, and whether it fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..architectures import model_dims
from ..data.packing import first_fit
from ..errors import PlanError
from ..layers.frozen import KINDS
from ..quantization import quantized_kind
from ..training.schema import Recipe
from .devices import Device, device
from .machine import Machine, machine
from .rows import Rows, longest_batch, rows_given, rows_of
from .sizes import Sizes, base_ids, sizes
from .skeleton import Skeleton, config_of, skeleton
from .step import StepMemory, step_memory


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will take.

    Attributes:
        recipe: with batch size, epochs and learning rate in numbers.
        sizes: parameters and bytes of files.
        step: memory of the step that takes the most, by kind.
        process_bytes: of the process besides (measured on this machine).
        loading_bytes: highest while the base is loaded, of the whole process.
        peak_bytes: highest of the whole process.
        rows: number and lengths of the rows to train on.
        updates: optimizer steps of the whole run.
        seconds: the least that the run's steps take: the base's products at this machine's best rate.
        device: what it is planned for.
        together: runs that train together.
    """

    recipe: Recipe
    sizes: Sizes
    step: StepMemory
    process_bytes: int
    loading_bytes: int
    peak_bytes: int
    rows: dict[str, int]
    updates: int
    seconds: float
    device: Device
    together: int = 1

    @property
    def fits(self) -> bool:
        """Whether the peak is below what the device has free."""
        return self.peak_bytes <= self.device.free_bytes

    def to_dict(self) -> dict[str, Any]:
        """Everything in numbers, for JSON."""
        found = dataclasses.asdict(dataclasses.replace(self, recipe=None))  # type: ignore[arg-type]
        return found | {
            "recipe": self.recipe.model_dump(), "step": found["step"] | {"total": self.step.total}, "fits": self.fits,
        }  # fmt: skip

    def line(self) -> str:
        """The plan in a line."""
        fit = "fits" if self.fits else "does not fit"
        return (
            f"Plan: {self.sizes.trained:,} trained of {self.sizes.base:,} parameters, peak memory {size(self.peak_bytes)} "
            f"({fit}: {size(self.device.free_bytes)} free), {self.updates:,} updates, at least {duration(self.seconds)}"
        )


def plan(
    recipe: Recipe | str | Path | Sequence[Recipe],
    *,
    device: str = "auto",
    rows: int | None = None,
    length: int | None = None,
    config: Any = None,
    say: Any = None,
) -> Plan:
    """Plan a run, or several that train together over one base, without making it: no weights are loaded.

    Args:
        recipe: or a recipe's file.
        device: "auto" or "cpu" (this machine's free memory), or an amount such as "16GiB".
        rows, length: plan for so many rows of so many tokens each, in place of the recipe's data.
        config: transformers' configuration in place of the recipe's base.
        say: is told when the machine is measured, once, for which a short run is made.

    Raises:
        PlanError: an unknown device, sizes that are none, a model whose pass does not run over tensors without values.
        DataError, BaseModelError, RecipeError: as the run would; `rows` and `length` do without the data.
    """
    recipes = [read(r) for r in (recipe if isinstance(recipe, Sequence) and not isinstance(recipe, str) else [recipe])]
    place = find_device(device)
    if not recipes:
        raise PlanError("there is no recipe to plan")
    if (rows is None) != (length is None):
        raise PlanError("rows and length: give both, or neither")
    plans = [single(r, place, rows, length, config, say) for r in recipes]
    return plans[0] if len(plans) == 1 else joined(plans)


find_device = device


def read(recipe: Any) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else Recipe.from_yaml(recipe)


def single(recipe: Recipe, place: Device, count: int | None, length: int | None, config: Any, say: Any) -> Plan:
    """One run's plan."""
    path = ""
    if config is None:
        config, path = config_of(recipe)
    found = rows_of(recipe) if count is None or length is None else rows_given(count, length)
    if not found.train:
        raise PlanError("there are no rows to train on")
    made = skeleton(recipe, config, path)
    dims = model_dims(made.model.base)
    recipe = recipe.filled(dims.hidden, len(found.train), dims.layers)
    size_of, batch = sizes(made), longest_batch(recipe, found)
    step = step_memory(recipe, batch, config, path)
    own = machine(form(made), say)
    highest = loading(made, size_of, own)
    total = updates(recipe, found)
    return Plan(
        recipe=recipe, sizes=size_of, step=step, process_bytes=own.process_bytes, loading_bytes=highest,
        peak_bytes=max(own.process_bytes + step.total, highest), rows=found.summary(), updates=total,
        seconds=seconds(recipe, found, made, own, total), device=place,
    )  # fmt: skip


def form(made: Skeleton) -> str:
    """The form of the base that the machine is measured for."""
    return made.scheme or ("bf16" if made.dtype is torch.bfloat16 else "fp32")


def loading(made: Skeleton, size_of: Sizes, own: Machine) -> int:
    """Highest memory while the base is loaded: its files are mapped, and what changes its dtype is a copy beside them."""
    stored = sum(f.stat().st_size for f in Path(made.path).glob("*.safetensors")) if made.path else 0
    plain = size_of.base * made.dtype.itemsize
    copies = made.scheme is not None or abs(stored - plain) > 0.02 * plain
    stored = stored or plain
    transient = size_of.base * 4 if made.scheme in ("nf4", "fp4") else 0
    return own.start_bytes + stored + (max(size_of.base_bytes, transient) if copies else 0)


def steps_an_epoch(recipe: Recipe, found: Rows) -> int:
    """Batches, or packs, that the rows make."""
    t = recipe.training
    if t.packing:
        return len(first_fit(found.lengths, t.tokens, t.seed))
    return -(-len(found.train) // (t.batch_size or 1))


def updates(recipe: Recipe, found: Rows) -> int:
    """Optimizer steps of a run."""
    t = recipe.training
    return t.max_steps or max(round(-(-steps_an_epoch(recipe, found) // t.accumulation) * (t.epochs or 1)), 1)


def seconds(recipe: Recipe, found: Rows, made: Skeleton, own: Machine, total: int) -> float:
    """The base's products over the machine's rate: 2 operations a weight and token forward, 2 backward (the base is frozen),
    again 2 where activations are computed again. Of adapters in the last blocks alone only the forward pass is counted."""
    t = recipe.training
    tokens = total * t.accumulation * sum(found.lengths) / steps_an_epoch(recipe, found)
    last = recipe.method == "adaption-prompt" or "layers_to_transform" in recipe.method_options
    passes = (2 if last else 4) + 2 * (t.gradient_checkpointing is True)
    return passes * multiplied(made.model) * tokens / own.operations


def multiplied(host: Any) -> int:
    """Weights of the base that every token is multiplied by: those of linear layers, without the head (labelled tokens)."""
    wanted, head = base_ids(host), host.base.get_output_embeddings()
    layers: list[Any] = [m for m in host.base.modules() if isinstance(m, KINDS["linear"]) and m is not head]
    own = {id(m.weight): m for m in layers if id(m.weight) in wanted}.values()
    return sum(m.in_features * m.out_features if quantized_kind(m) else m.weight.numel() for m in own)


def joined(plans: list[Plan]) -> Plan:
    """Runs that train together: one base, and all that is each run's own."""
    first = plans[0]
    for other in plans[1:]:
        if (other.recipe.base, other.recipe.quantization) != (first.recipe.base, first.recipe.quantization):
            raise PlanError(
                f"base: {first.recipe.base} and {other.recipe.base}: runs that are planned together share one base in one "
                "form"
            )

    def add(name: str) -> int:
        return sum(getattr(p.step, name) for p in plans)

    step = StepMemory(
        base=first.step.base, adapter=add("adapter"), gradients=add("gradients"), optimizer=add("optimizer"),
        kept=add("kept"), workspace=max(p.step.workspace for p in plans), allocator=add("allocator"),
        loss=max(p.step.loss for p in plans),
    )  # fmt: skip
    peak = max(first.process_bytes + step.total, first.loading_bytes)
    spent = sum(p.seconds for p in plans)
    return dataclasses.replace(first, step=step, peak_bytes=peak, seconds=spent, together=len(plans))


# -- for people -----------------------------------------------------------------------------------------------------------
def size(count: float) -> str:
    """Bytes for people: 1.2 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def duration(seconds: float) -> str:
    """A time for people: 40 s, 3 min, 2.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
