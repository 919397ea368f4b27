"""The output directory of a run: what may be there before, and the recipe beside the adapter."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from tempfile import TemporaryFile
from uuid import uuid4

from .. import processes
from ..errors import RecipeError, UnsupportedError
from .curve import CURVE_NAME
from .resume import checkpoints
from .schema import Recipe

RECIPE_NAME = "recipe.yaml"
METRICS_NAME = "metrics.json"
ADAPTER_NAMES = ("adapter_config.json", "adapter_model.safetensors", "training_state.safetensors", "README.md")


def open_output(recipe: Recipe) -> Path:
    """The output directory, made if need be, an earlier run removed with `overwrite`.

    Raises:
        RecipeError: an earlier run is there and neither `overwrite` nor `resume` is set, or `resume` has another method,
            base or quantisation; nothing can be written there.
    """
    folder = Path(recipe.output_dir)
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"output_dir={str(folder)!r} is a file; name a directory")
    own = [n for n in (RECIPE_NAME, METRICS_NAME, CURVE_NAME, *ADAPTER_NAMES) if (folder / n).exists()]
    earlier = [*own, *(p.name for p in checkpoints(folder))]
    if earlier and recipe.resume:
        check_resumable(recipe, folder)
    elif earlier and recipe.overwrite:
        for name in own:
            (folder / name).unlink()
        for path in checkpoints(folder):
            shutil.rmtree(path)
    elif earlier:
        raise RecipeError(
            f"output_dir={str(folder)!r} holds an earlier run ({', '.join(earlier[:6])}). Choose another directory, go on "
            "with it by resume: true (--resume), or replace it by overwrite: true (--overwrite)."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RecipeError(
            f"output_dir={str(folder)!r} cannot be written into ({error.strerror or error}); choose another directory"
        ) from error
    return folder


def check_shared(folder: Path) -> None:
    """UnsupportedError where a process does not see what the first one writes into the output directory: it could not
    resume. All processes must call this."""
    if processes.count() == 1:
        return
    mark = folder / f".shared-{processes.gathered(uuid4().hex)[0]}"
    processes.of_first(mark.touch)
    every = processes.gathered(mark.exists())
    processes.of_first(mark.unlink)
    if not all(every):
        raise UnsupportedError(
            f"output_dir={str(folder)!r}: process {every.index(False)} does not see what process 0 writes there. The "
            "processes of a run need a folder that all their machines share, for checkpoints; nothing was trained."
        )


def check_resumable(recipe: Recipe, folder: Path) -> None:
    """RecipeError where the run in `folder` trained something else."""
    if not (folder / RECIPE_NAME).exists():
        return
    earlier = Recipe.from_yaml(folder / RECIPE_NAME)
    changed = [k for k in ("base", "quantization", "method") if getattr(earlier, k) != getattr(recipe, k)]
    if changed:
        told = ", ".join(f"{k}: {getattr(earlier, k)!r} then, {getattr(recipe, k)!r} now" for k in changed)
        raise RecipeError(f"the run in {str(folder)!r} cannot be resumed with another recipe ({told})")


def write_recipe(recipe: Recipe, folder: Path) -> None:
    """`recipe.yaml`, ready to be run again as it is."""
    write_text(folder / RECIPE_NAME, recipe.model_copy(update={"resume": False, "overwrite": False}).to_yaml())


def write_text(path: Path, text: str) -> None:
    """A text file that appears whole or not at all."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
