"""A comparison on the machines of a Ray cluster: the runs over one form of the base are a task, as they are a turn here.

    here      groups of runs ──→ tasks            comparison.json, report.html ←── parts/*.json
    a task    base, data → runs together → a part file after every run; checkpoints in the runs' own folders

All machines share the output folder. What a task has finished stands in its part file, so one whose machine is gone goes on
elsewhere: runs that were done are not trained again, others resume at their last checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import cluster
from ..errors import ConfigError, DataError
from ..files import parse_json, read_text
from ..training import Recipe
from .bases import Bases
from .field import Field
from .findings import DONE, FAILED, INTERRUPTED, WAITING, MethodRun
from .general import General
from .progress import Shown
from .result import ComparisonResult, write
from .search import search, searching
from .spec import MethodSpec

PARTS = "parts"
TRIES = 3  # machines that may be lost under one group
OWN = {"save_strategy": "epoch", "keep_checkpoints": 1}  # what a task needs to go on elsewhere


@contextlib.contextmanager
def connected(address: str, folder: Path) -> Iterator[Spread]:
    """A cluster whose machines fit this one, and see the folder."""
    with cluster.connected(None if address == "local" else address) as ray:
        folder.mkdir(parents=True, exist_ok=True)
        cluster.check_machines(ray, folder)
        yield Spread(ray)


@dataclass(kw_only=True)
class Order:
    """What a task is told.

    Args:
        part: the file that it writes; what it holds already is done.
        runs: with their recipes.
        main: the scheme whose measures are the base's own.
    """

    part: Path
    base: str
    dtype: str
    main: str | None
    runs: list[tuple[MethodRun, Recipe]]
    general: dict[str, Any] | None
    at_once: int


class Part(ComparisonResult):
    """The findings of one task; what is saved is for those who ordered it."""

    part: Path

    def save(self) -> None:
        write(self.part, json.dumps(self.to_dict(), allow_nan=False))


class PartField(Field):
    """Runs that may have been begun elsewhere."""

    def placed(self, recipe: Recipe) -> Recipe:
        from ..training.resume import last_complete_checkpoint

        begun = last_complete_checkpoint(recipe.output_dir) is not None
        return recipe.replace(overwrite=not begun, resume=begun)


class Spread:
    """A comparison's tasks.

    Args:
        ray: the module, connected.
    """

    def __init__(self, ray: Any) -> None:
        self.ray = ray

    def options(self, tasks: int) -> dict[str, Any]:
        """What a task takes of a machine: its share of the processors, or a GPU where there are some."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        each = int(sum(n.get("CPU", 0) for n in nodes)) // max(tasks, 1)
        cpus = max(1, min(each, int(max(n.get("CPU", 1) for n in nodes))))
        return {"num_cpus": cpus, "num_gpus": int(any(n.get("GPU") for n in nodes)), "max_retries": TRIES}

    # -- learning rates ----------------------------------------------------------------------------------------------------
    def search(
        self, specs: list[MethodSpec], layers: dict[str, dict[str, Any]], seeds: Sequence[int], bases: Bases, budget: float,
        shown: Shown,
    ) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
        """As `search.search`, each group on a machine of its own, in the same share of the time."""
        groups = list(searching(specs, layers, seeds).values())
        methods = sum(map(len, groups))
        task = self.ray.remote(**self.options(len(groups)))(search_one)
        shown.doing("searching learning rates")
        asked = []
        for group in groups:
            names = {label for label, _ in group}
            own, share = [s for s in specs if s.label in names], budget * len(group) / methods
            asked.append(
                task.remote(own, {n: absolute_layer(layers[n]) for n in names}, seeds, bases.name, bases.dtype, share)
            )
        try:
            parts = [self._answer(reference) for reference in asked]
        except BaseException:
            for reference in asked:
                self.ray.cancel(reference, force=True)
            raise
        return {label: found for part in parts for label, found in part.items()}

    def _answer(self, reference: Any) -> Any:
        try:
            return self.ray.get(reference)
        except Exception as error:
            raise cluster.as_there(error) from None

    # -- runs --------------------------------------------------------------------------------------------------------------
    def train(self, field: Field, groups: list[list[int]], recipes: Mapping[int, Recipe]) -> None:
        """Train all groups, at once as far as there are machines; the result is renewed after every run."""
        folder = field.result.output_dir.resolve() / PARTS
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.json"):
            old.unlink()
        task = self.ray.remote(**self.options(len(groups)))(trained)
        pending = {}
        for number, group in enumerate(groups):
            order = self._order(folder / f"{number}.json", field, [(field.result.runs[i], recipes[i]) for i in group])
            pending[task.remote(order)] = (order, group)
        field.shown.doing(f"training on {len(self.ray.nodes())} machines")
        try:
            while pending:
                done, _ = self.ray.wait(list(pending), timeout=1)
                for order, group in pending.values():
                    self._take_over(order.part, field, group, recipes)
                for reference in done:
                    self._ended(reference, field, pending.pop(reference)[1])
        except KeyboardInterrupt:
            for reference in pending:
                self.ray.cancel(reference, force=True)
            for run in [run for run in field.result.runs if run.status == WAITING][:1]:
                run.status, run.error = INTERRUPTED, "stopped by Ctrl-C"
        field.result.save()

    def _order(self, part: Path, field: Field, runs: list[tuple[MethodRun, Recipe]]) -> Order:
        general = field.general.section if field.general is not None else None
        own = [(run, elsewhere(recipe)) for run, recipe in runs]
        return Order(
            part=part, base=absolute(field.bases.name), dtype=field.bases.dtype, main=field.bases.main, runs=own,
            general=None if general is None else general | {"source": absolute(str(general.get("source")))},
            at_once=field.at_once,
        )  # fmt: skip

    def _take_over(self, part: Path, field: Field, group: list[int], recipes: Mapping[int, Recipe]) -> None:
        """What a part file says that is new."""
        if not part.is_file():
            return
        found = parse_json(read_text(part, DataError), str(part), DataError)
        field.result.base_metrics.update(found["base_metrics"])
        field.result.quantized.update(found["quantized"])
        field.result.train_rows, field.result.eval_rows = found["train_rows"], found["eval_rows"]
        news = False
        for i, values in zip(group, found["runs"], strict=True):
            run = field.result.runs[i]
            if run.status == WAITING and took(run, values):
                run.recipe = as_here(run.recipe, recipes[i])
                field.work[id(run)].ended()
                field.shown.ended(run)
                news = True
        if news:
            field.result.seconds = field.shown.seconds
            field.result.save()

    def _ended(self, reference: Any, field: Field, group: list[int]) -> None:
        """A task is over: what it has not done has failed."""
        try:
            self._answer(reference)
        except DataError:  # it concerns all
            raise
        except Exception as error:
            for run in [field.result.runs[i] for i in group if field.result.runs[i].status == WAITING]:
                run.status, run.error = FAILED, f"{type(error).__name__}: {error}"
                field.work[id(run)].ended()
                field.shown.ended(run)


def took(run: MethodRun, values: Mapping[str, Any]) -> bool:
    """Let a run be what a part file says of it, if it says that it is over; whether it does."""
    over = values["status"] in (DONE, FAILED)
    for name, value in values.items() if over else ():
        setattr(run, name, value)
    return over


# -- on the machines -------------------------------------------------------------------------------------------------------
def trained(order: Order) -> None:
    """Train a group of runs, or what is left of it."""
    result = Part(base=order.base, data="", output_dir=order.part.parent)
    result.part, result.runs = order.part, [run for run, _ in order.runs]
    if order.part.is_file():
        for run, values in zip(
            result.runs, parse_json(read_text(order.part, DataError), "part", DataError)["runs"], strict=True
        ):
            took(run, values)
    bases = Bases(order.base, order.dtype)
    bases.main = order.main
    general = None if order.general is None else General(order.general)
    left = [(run, recipe) for run, recipe in order.runs if run.status == WAITING]
    with Shown(True, None, len(left)) as shown:
        field = PartField(result, bases, general, order.at_once, shown)
        field.plan({i: recipe for i, (_, recipe) in enumerate(order.runs)})
        if left and not field.train(left):
            raise ConfigError("The training was interrupted on its machine.")
    result.save()


def search_one(
    specs: list[MethodSpec], layers: dict[str, dict[str, Any]], seeds: Sequence[int], base: str, dtype: str, seconds: float
) -> dict[str, list[dict[str, Any]]]:
    """Search the learning rates of one group."""
    with Shown(True, None, len(specs)) as shown:
        return search(specs, layers, seeds, Bases(absolute(base), dtype), seconds, shown)


def absolute(path: str) -> str:
    """A path here as one from anywhere; names stay."""
    return os.path.abspath(path) if os.path.exists(path) else path


def absolute_layer(layer: dict[str, Any]) -> dict[str, Any]:
    data = dict(layer.get("data") or {})
    return layer | {
        "base": absolute(str(layer["base"])),
        "data": data | {"source": absolute(str(data.get("source", "tweets")))},
    }


def elsewhere(recipe: Recipe) -> Recipe:
    """A recipe for another machine: absolute paths, and checkpoints where none were asked for."""
    training = recipe.training.model_dump()
    if training["save_strategy"] == "no":
        training |= OWN
    data = recipe.data.model_dump() | {"source": absolute(recipe.data.source)}
    return recipe.replace(
        training=training, data=data, base=absolute(recipe.base), output_dir=os.path.abspath(recipe.output_dir)
    )


def as_here(text: str, recipe: Recipe) -> str:
    """The recipe that a run was trained with, in the words of the one that was ordered: it repeats the run here."""
    from ..training.schema import load_yaml

    if not text:
        return recipe.to_yaml()
    ran = Recipe.from_dict(load_yaml(text))
    kept = {name: getattr(recipe.training, name) for name in ("save_strategy", "keep_checkpoints")}
    back = {"training": ran.training.model_dump() | kept, "data": recipe.data.model_dump()}
    return ran.replace(**back, base=recipe.base, output_dir=recipe.output_dir, overwrite=False, resume=False).to_yaml()
