"""Training every method on one base, one after another; on quantised forms of it where a row says so."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from ..errors import ConfigError, DataError, GraftError
from .bases import Bases
from .result import DONE, FAILED, INTERRUPTED, JSON_NAME, ComparisonResult, MethodRun
from .spec import METHODS, MethodSpec, merged, parse_all

if TYPE_CHECKING:
    from rich.console import Console

    from ..training import Recipe

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
) -> ComparisonResult:
    """Train every method on one data set with one base, and measure all of them on the held-out rows.

    The base is loaded once and stays frozen; a row over a quantised base loads it once more in that form, by its name, and
    it is let go after the last such row. Adapters are written below `output_dir`, a folder each, and beside them
    `comparison.json` and `report.html`, which are renewed after every method. A method that fails does not stop the
    others: its row says why. Ctrl-C keeps what is finished; the result's `interrupted` is then true.

    Args:
        base: model id or path; "graftlm-base" is the bundled one.
        data: source of the data, or the whole `data` part of a recipe (source, format, columns, split, eval_split, …).
        methods: lines such as "lora" or "lora:r=16,training.learning_rate=1e-3" (see `spec`), or `MethodSpec`s.
        overwrite: replace an earlier comparison in `output_dir`.
        seeds: each method is trained once with each.
        settings: parts of a recipe for all methods, e.g. `{"training": {"epochs": 5}}`.
        overrides: the same by method (name or label), over `settings`.
        model, tokenizer: a loaded base, instead of loading `base`, for the rows that name no quantisation.
        quiet: no output; else progress goes to `console` (stderr by default).
        command: the command line that repeats this, for the report.

    Raises:
        GraftError: what concerns all methods: the base, the data, an unknown method, no seeds.
    """
    from ..training.bases import scheme_name

    specs = parse_all(methods)
    check_seeds(seeds)
    check_output(Path(output_dir), overwrite)
    unknown = set(overrides or ()) - {s.method for s in specs} - {s.label for s in specs}
    if unknown:
        raise ConfigError(f"overrides for {sorted(unknown)}, which are not compared; compared: {[s.label for s in specs]}.")
    source = data if isinstance(data, str) else str(data.get("source"))
    result = ComparisonResult(base=base, data=source, output_dir=Path(output_dir), command=command)
    result.runs = [planned(spec, seed, len(seeds) > 1) for seed in seeds for spec in specs]
    common = merged({"base": base, "data": {"source": data} if isinstance(data, str) else data}, settings)
    layers = {s.label: merged(common, *[(overrides or {}).get(n) for n in (s.method, s.label)], s.overrides) for s in specs}
    same_data(common, layers)
    schemes = {s.label: scheme_name(layers[s.label].get("quantization")) for s in specs}
    bases = Bases(base, common.get("dtype", "auto"), model, tokenizer)
    bases.main = None if bases.given or None in schemes.values() else schemes[specs[0].label]
    result.base_parameters = bases.get(bases.main).parameters
    result.machine = machine(bases.get(bases.main).model)
    start = time.perf_counter()
    result.save()
    say = printer(quiet, console)
    for number, run in enumerate(result.runs, 1):
        say(f"[bold cyan]{number}/{len(result.runs)}[/] [bold]{escape(run.label)}[/]")
        spec = next(s for s in specs if s.label == run.label)
        one(result, run, spec, layers[run.label], bases, quiet)
        result.seconds = time.perf_counter() - start
        result.save()
        if run.error:
            say(f"  [red]{run.status}[/]: {escape(run.error)}")
        if run.status == INTERRUPTED:
            break
        bases.renew(schemes[run.label])
        bases.keep({schemes[r.label] for r in result.runs[number:]})
    return result


def one(
    result: ComparisonResult, run: MethodRun, spec: MethodSpec, layers: dict[str, Any], bases: Bases, quiet: bool
) -> None:
    """Train and measure one method; what goes wrong is noted in its run, unless it concerns all methods."""
    from .. import training

    try:
        recipe = recipe_for(result, run, spec, layers)
        run.recipe, run.quantization = recipe.to_yaml(), recipe.quantization
        baseline = bases.measure(recipe, result)
        base = bases.get(recipe.quantization)
        found = training.run(
            recipe.replace(overwrite=True), model=base.model, tokenizer=base.tokenizer, quiet=quiet, baseline=baseline
        )
    except KeyboardInterrupt:
        run.status, run.error = INTERRUPTED, "stopped by Ctrl-C"
        return
    except DataError:
        raise
    except (GraftError, ArithmeticError, RuntimeError, ValueError, TypeError, OSError) as error:
        run.status, run.error = FAILED, f"{type(error).__name__}: {error}"
        return
    run.recipe = (found.output_dir / "recipe.yaml").read_text(encoding="utf-8")
    run.metrics, run.history, run.samples = dict(found.metrics), list(found.history), list(found.samples)
    run.quantization = found.metrics.get("quantization")
    run.status, run.error = judged(found.metrics)


def judged(metrics: Mapping[str, Any]) -> tuple[str, str | None]:
    """Status and error of a run that came to its end: a loss that is no number is a failure."""
    loss = metrics.get("loss")
    if loss is None:
        return FAILED, "no held-out loss was measured; does the data have held-out rows (data.eval_split)?"
    if not math.isfinite(loss):
        return FAILED, f"the held-out loss is {loss}: training diverged; lower training.learning_rate"
    return DONE, None


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
    return recipe.replace(f"training.learning_rate={recipe.learning_rate}")  # written out, so that it is repeated exactly


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


def printer(quiet: bool, console: Console | None) -> Any:
    """What prints a line of progress."""
    if quiet:
        return lambda text: None
    from rich.console import Console

    out = console or Console(stderr=True, highlight=False)
    return out.print
