"""The plan of a run: parameters, files, memory by kind, time, and whether it fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..architectures import model_dims
from ..errors import BaseModelError, DataError, PlanError
from ..quantization import quantized_layers
from ..training.schema import Recipe
from .allocators import Training
from .devices import Device, device
from .evaluating import evaluation_memory
from .machine import Machine, machine
from .rows import Rows, longest_batch, rows_given, rows_of
from .sizes import Sizes, bytes_of, sizes
from .skeleton import Skeleton, config_of, skeleton
from .step import ShortCuts, StepMemory, short_cuts, step_memory
from .timing import run_times, step_time, updates

CUDA_CONTEXT = 600 << 20  # bytes that CUDA and its libraries take on a GPU: assumed, not measured
AHEAD = {"int8": 2.0, "nf4": 0.5, "fp4": 0.5}
"""Bytes a quantised weight that threads have read ahead while a base is loaded: seen of seven bases. It is a race: of one
base it differed by 100 MiB from one run to the next."""
QUANTISING = 45 << 20  # bytes of the code that loads and quantises, seen in the same runs


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will take.

    Attributes:
        recipe: with batch size, epochs and learning rate in numbers.
        sizes: parameters and bytes of files.
        step: memory of the step that takes the most, by kind.
        process_bytes: of the process besides (measured on this machine).
        loading_bytes: highest while the base is loaded, of the whole process.
        evaluation_bytes: highest in evaluations and samples, above the weights.
        data_bytes: of the data, as text and as tokens.
        peak_bytes: highest of the whole process.
        rows: number and lengths of the rows to train on.
        updates: optimizer steps of the whole run.
        seconds: the least, what is expected, and the most that the run takes on this machine (0 for GPUs: not known).
        step_seconds: that a step is expected to take.
        device: what it is planned for.
        together: runs that train together.
    """

    recipe: Recipe
    sizes: Sizes
    step: StepMemory
    process_bytes: int
    loading_bytes: int
    evaluation_bytes: int
    data_bytes: int
    peak_bytes: int
    rows: dict[str, int]
    updates: int
    seconds: tuple[float, float, float]
    step_seconds: float
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
            f"({fit}: {size(self.device.free_bytes)} free), {self.updates:,} updates, "
            f"{self.time()}"
        )

    def time(self) -> str:
        """The time in words."""
        if self.device.gpu:
            return "time not known; not checked on a GPU"
        return f"{duration(self.seconds[0])} to {duration(self.seconds[2])}"


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
        device: "auto" or "cpu" (this machine's free memory), an amount such as "16GiB", or a GPU such as "h100".
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
    if rows is not None and length is not None:
        given: Rows | None = rows_given(rows, length)
    else:
        given = None
    plans = [single(r, place, given or data_of(r), lambda form: machine(form, say), config) for r in recipes]
    return plans[0] if len(plans) == 1 else joined(plans)


find_device = device


def data_of(recipe: Recipe) -> Rows:
    """The recipe's rows; where they are not to be had, the error says that a plan does without them."""
    try:
        return rows_of(recipe)
    except (DataError, BaseModelError) as error:
        advice = "To plan without data and tokenizer, give the rows' number and length: --rows 1000 --length 200"
        raise type(error)(f"{error}. {advice}") from error


def read(recipe: Any) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else Recipe.from_yaml(recipe)


def single(recipe: Recipe, place: Device, found: Rows, measured: Callable[[str], Machine], config: Any = None) -> Plan:
    """One run's plan.

    Args:
        measured: gives the machine's figures for a form of the base.
    """
    path = ""
    if place.gpu and recipe.dtype in ("auto", "fp16"):
        recipe = recipe.replace("dtype=bf16")  # of the same size; this CPU would choose otherwise
    if config is None:
        config, path = config_of(recipe)
    if not found.train.count:
        raise PlanError("there are no rows to train on")
    made = skeleton(recipe, config, path)
    forms = short_cuts(recipe, config)
    forms = forms.on_gpu(made.dtype) if place.gpu else forms
    check_packing(recipe, made, forms)
    dims = model_dims(made.model.base)
    recipe = recipe.filled(dims.hidden, found.train.count, dims.layers)
    own, size_of = measured(form(made)), sizes(made)
    gpu = Training(batches=min(recipe.training.accumulation, 2), flat=recurrent(made.model)) if place.gpu else None
    step = step_memory(recipe, longest_batch(recipe, found), config, path, made, forms, gpu)
    times = run_times(recipe, found, made, size_of, own, step.work)
    a_step = step_time(recipe, found, made, own, step.work)
    evaluation = evaluation_memory(recipe, found, made, place.gpu)
    highest, process, data = loading(made, size_of, own), own.process_bytes, found.data_bytes
    if place.gpu:  # weights are loaded there piece by piece, and the data stays in main memory
        highest, process, data, times, a_step = 0, CUDA_CONTEXT, 0, (0.0, 0.0, 0.0), 0.0
    return Plan(
        recipe=recipe, sizes=size_of, step=step, process_bytes=process, loading_bytes=highest, evaluation_bytes=evaluation,
        data_bytes=data, peak_bytes=peak(process + data, step, evaluation, highest), rows=found.summary(),
        updates=updates(recipe, found), seconds=times, step_seconds=a_step, device=place,
    )  # fmt: skip


def peak(besides: int, step: StepMemory, evaluation: int, loading: int) -> int:
    """The highest of a process: in a training step, in an evaluation, or while the base is loaded.

    Args:
        besides: what it takes besides the step (libraries, data).
        evaluation: highest above the weights.
        loading: highest of the whole process.
    """
    weights = step.base + step.adapter + step.optimizer
    return max(besides + step.total, besides + weights + evaluation, loading)


def check_packing(recipe: Recipe, made: Skeleton, forms: ShortCuts) -> None:
    """PlanError where the run would refuse to pack its rows."""
    if recipe.training.packing and made.seq2seq:
        raise PlanError("training.packing is for decoder-only models; leave it out for encoder-decoder ones")
    if recipe.training.packing and not forms.packs:
        raise PlanError(
            f"training.packing: {type(made.model.base).__name__} with {recipe.method} gives other results for packed rows; "
            "leave packing out, its batches are then padded"
        )


def recurrent(model: nn.Module) -> list[list[int]]:
    """Bytes of the weights of each recurrent network."""
    return [[bytes_of(p) for p in m.parameters()] for m in model.modules() if isinstance(m, nn.RNNBase)]


def form(made: Skeleton) -> str:
    """The form of the base that the machine is measured for."""
    return made.scheme or ("bf16" if made.dtype is torch.bfloat16 else "fp32")


def loading(made: Skeleton, size_of: Sizes, own: Machine) -> int:
    """Highest memory while the base is loaded: its files are mapped, and what changes its dtype is a copy beside them. Of
    what is quantised one weight after the other is there twice in fp32, and some of their copies are read ahead."""
    stored = sum(f.stat().st_size for f in Path(made.path).glob("*.safetensors")) if made.path else 0
    plain = size_of.base * made.dtype.itemsize
    copies = made.scheme is not None or abs(stored - plain) > 0.02 * plain
    counts = [m.in_features * m.out_features for _, m in quantized_layers(made.model.base)]
    transient = 2 * 4 * max(counts, default=0) + QUANTISING * bool(counts)
    transient += round(AHEAD.get(made.scheme or "", 0) * sum(counts))
    return own.start_bytes + (stored or plain) + (size_of.base_bytes + transient if copies else 0)


def joined(plans: Sequence[Plan]) -> Plan:
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
        loss=max(p.step.loss for p in plans), work=first.step.work,
    )  # fmt: skip
    least, expected, most = (sum(times) for times in zip(*(p.seconds for p in plans), strict=True))
    evaluation = max(p.evaluation_bytes for p in plans)
    data = sum(p.data_bytes for p in plans)
    return dataclasses.replace(
        first, step=step, evaluation_bytes=evaluation, data_bytes=data, seconds=(least, expected, most),
        peak_bytes=peak(first.process_bytes + data, step, evaluation, first.loading_bytes),
        step_seconds=sum(p.step_seconds for p in plans), together=len(plans),
    )  # fmt: skip


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
