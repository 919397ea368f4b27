"""Training every method on one base, all of them together; on quantised forms of it where a row says so."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, GraftError
from .bases import Bases
from .field import Field
from .findings import FAILED, INTERRUPTED, JSON_NAME, MethodRun
from .general import General
from .progress import Shown
from .result import ComparisonResult
from .search import search
from .spec import METHODS, MethodSpec, merged, parse_all

if TYPE_CHECKING:
    from rich.console import Console

    from ..training import Recipe
    from .spread import Spread

# The last weights count, not the best on the held-out rows: those rows choose nothing, so that they measure honestly.
FAIR = {"training": {"load_best": False, "save_strategy": "no"}}


def compare(
    *,
    base: str = "graftlm-base",
    data: str | Mapping[str, Any] = "tweets",
    methods: Sequence[str | MethodSpec] = METHODS,
    output_dir: str | os.PathLike = "comparison",
    overwrite: bool = False,
    seeds: Sequence[int] = (0,),
    settings: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    model: Any = None,
    tokenizer: Any = None,
    quiet: bool = False,
    console: Console | None = None,
    command: str | None = None,
    budget: float | None = None,
    general: str | Mapping[str, Any] | None = "quotes",
    at_once: int = 8,
    ray: str | None = None,
) -> ComparisonResult:
    """Train every method on one data set with one base, and measure all of them on the held-out rows.

    All of them train together over one base, which is loaded once and stays frozen, and each comes out as if it were
    alone (`training.together`); rows over a quantised base train over that form of it, loaded by its name and let go after
    the last such row. Adapters are written below `output_dir`, a folder each, and beside them `comparison.json` and
    `report.html`, which are renewed after every method. A method that fails does not stop the others: its row says why.
    Ctrl-C keeps what is finished; the result's `interrupted` is then true.

    Args:
        base: model id or path; "graftlm-base" is the bundled one.
        data: source of the data, or the whole `data` part of a recipe (source, format, columns, split, eval_split, …).
        methods: lines such as "lora", "lora:r=16,training.learning_rate=1e-3" or "every" (see `spec`), or `MethodSpec`s.
        overwrite: replace an earlier comparison in `output_dir`.
        seeds: each method is trained once with each.
        settings: parts of a recipe for all methods, e.g. `{"training": {"epochs": 5}}`.
        overrides: the same by method (name or label), over `settings`.
        model, tokenizer: a loaded base, instead of loading `base`, for the rows that name no quantisation.
        quiet: no output; else progress goes to `console` (stderr by default).
        command: the command line that repeats this, for the report.
        budget: seconds for a search of learning rates before (see `search`), for the rows that name none; None for none.
        general: general text (source or `data` part) on which the loss before and after shows what was forgotten; None
            for none.
        at_once: how many runs train at a time; memory grows with it.
        ray: address of a Ray cluster, whose machines train a form of the base each ("local": one that is started here); all
            of them see `output_dir`.

    Raises:
        GraftError: what concerns all methods: the base, the data, an unknown method, no seeds.
    """
    from ..training.bases import scheme_name

    specs = parse_all(methods)
    check_seeds(seeds)
    check_output(Path(output_dir), overwrite)
    if budget is not None and not budget > 0:
        raise ConfigError(f"budget={budget!r}: expected seconds above 0, or None for no search.")
    if ray is not None and model is not None:
        raise ConfigError("A base that is loaded already does not travel: with ray, leave model out and name the base.")
    with spread_over(ray, Path(output_dir)) as spread:
        source = data if isinstance(data, str) else str(data.get("source"))
        result = ComparisonResult(base=base, data=source, output_dir=Path(output_dir), command=command)
        result.runs = [planned(spec, seed, len(seeds) > 1) for seed in seeds for spec in specs]
        common = merged({"base": base, "data": {"source": data} if isinstance(data, str) else data}, settings)
        layers = layers_of(specs, common, overrides or {})
        schemes = {s.label: scheme_name(layers[s.label].get("quantization")) for s in specs}
        bases = Bases(base, common.get("dtype", "auto"), model, tokenizer)
        bases.main = None if bases.given or None in schemes.values() else schemes[specs[0].label]
        result.base_parameters = bases.get(bases.main).parameters
        result.machine = machine(bases.get(bases.main).model)
        texts = General.of(general, source)
        result.general = texts.source if texts is not None else None
        result.save()
        with Shown(quiet, console, len(result.runs)) as shown:
            search_with = search if spread is None else spread.search
            if budget is not None and not searched(result, specs, layers, bases, budget, shown, search_with):
                return result
            recipes = recipes_of(result, specs, layers, shown)
            field = Field(result, bases, texts, at_once, shown)
            field.plan(recipes)
            groups = grouped(recipes)
            if spread is not None:
                spread.train(field, groups, recipes)
                groups = []
            for number, group in enumerate(groups):
                if not field.train([(result.runs[i], recipes[i]) for i in group]):
                    break
                bases.keep({recipes[i].quantization for later in groups[number + 1 :] for i in later})
            result.seconds = shown.seconds
        result.save()
        return result


@contextlib.contextmanager
def spread_over(ray: str | None, folder: Path) -> Iterator[Spread | None]:
    """The machines of a Ray cluster, checked before work is lost; None where all is done here."""
    if ray is None:
        yield None
        return
    from .spread import connected

    with connected(ray, folder) as spread:
        yield spread


def layers_of(
    specs: Sequence[MethodSpec], common: Mapping[str, Any], overrides: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The parts of a recipe for each row, by its label.

    Raises:
        ConfigError: overrides for a row that is not compared; rows on different data.
    """
    unknown = set(overrides) - {s.method for s in specs} - {s.label for s in specs}
    if unknown:
        raise ConfigError(f"overrides for {sorted(unknown)}, which are not compared; compared: {[s.label for s in specs]}.")
    layers = {s.label: merged(common, *[overrides.get(n) for n in (s.method, s.label)], s.overrides) for s in specs}
    same_data(common, layers)
    return layers


def searched(
    result: ComparisonResult, specs: list[MethodSpec], layers: dict[str, dict[str, Any]], bases: Bases, budget: float,
    shown: Shown, search_with: Callable[..., dict[str, list[dict[str, Any]]]],
) -> bool:  # fmt: skip
    """Search the learning rates and put them into `layers`; False after Ctrl-C, which the result notes."""
    from ..training import TrainingInterrupted

    try:
        result.search = search_with(
            specs, layers, list(dict.fromkeys(run.seed for run in result.runs)), bases, budget, shown
        )
    except (KeyboardInterrupt, TrainingInterrupted):
        first = result.runs[0]
        first.status, first.error = INTERRUPTED, "stopped by Ctrl-C, in the search of learning rates"
        result.save()
        return False
    for label, trials in result.search.items():
        rate = next(t["learning_rate"] for t in trials if t["status"] == "chosen")
        layers[label] = merged(layers[label], {"training": {"learning_rate": rate}})
    return True


def recipes_of(
    result: ComparisonResult, specs: Sequence[MethodSpec], layers: Mapping[str, dict[str, Any]], shown: Shown
) -> dict[int, Recipe]:
    """The recipes of the runs by their numbers, without those whose recipe is wrong: their rows say why."""
    recipes = {}
    for number, run in enumerate(result.runs):
        spec = next(s for s in specs if s.label == run.label)
        try:
            recipe = recipes[number] = recipe_for(result, run, spec, layers[run.label])
            run.recipe, run.quantization = recipe.to_yaml(), recipe.quantization
        except (GraftError, ValueError, TypeError) as error:
            run.status, run.error = FAILED, f"{type(error).__name__}: {error}"
            shown.ended(run)
    return recipes


def grouped(recipes: dict[int, Recipe]) -> list[list[int]]:
    """Numbers of the runs that can train together: over one form of the base."""
    from ..training.together import common_parts

    groups: dict[tuple, list[int]] = {}
    for number, recipe in recipes.items():
        groups.setdefault(common_parts(recipe), []).append(number)
    return list(groups.values())


def recipe_for(result: ComparisonResult, run: MethodRun, spec: MethodSpec, layers: dict[str, Any]) -> Recipe:
    """The recipe of one run."""
    from ..training import Recipe

    own = {
        "method": spec.method,
        "method_options": spec.options,
        "training": {"seed": run.seed},
        "output_dir": str(result.output_dir / run.directory),
    }
    recipe = Recipe.from_dict(merged(FAIR, layers, own))
    if recipe.training.learning_rate == "search":
        raise ConfigError("training.learning_rate: search: a comparison searches for its rows with a budget (--budget 10m).")
    return recipe


def same_data(common: Mapping[str, Any], layers: Mapping[str, Mapping[str, Any]]) -> None:
    """ConfigError where a method would be trained or measured on other rows than the rest."""
    other = [
        label for label, own in layers.items() if own.get("data") != common.get("data") or own["base"] != common["base"]
    ]
    if other:
        raise ConfigError(f"{other[0]}: methods are compared on one base and the same data; change these for all of them.")


def planned(spec: MethodSpec, seed: int, several: bool) -> MethodRun:
    return MethodRun(spec.label, spec.method, seed, f"{spec.slug}-seed{seed}" if several else spec.slug)


def check_output(folder: Path, overwrite: bool) -> None:
    """ConfigError where something would be lost, or where the folder is not ours to replace."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    ours = (folder / JSON_NAME).is_file()
    if ours and overwrite:
        return
    what = "holds an earlier comparison; pass overwrite (--overwrite) to replace it" if ours else "is not empty"
    raise ConfigError(f"{folder} {what}, or choose another output directory.")


def check_seeds(seeds: Sequence[int]) -> None:
    if not seeds or len(set(seeds)) != len(seeds) or any(s < 0 for s in seeds):
        raise ConfigError(f"seeds={list(seeds)}: expected one or more different numbers from 0 on.")


def machine(model: Any) -> dict[str, Any]:
    """Device and versions, for the report."""
    import torch
    import transformers

    from ..version import __version__

    device = model.device.type
    name = torch.cuda.get_device_name(model.device) if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "graftlm": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
