"""What a machine is measured for once: memory of the process itself, and how fast it multiplies. It is kept.

The process (interpreter, libraries, threads' buffers) is measured by a real run: two steps on the bundled base in a fresh
process, its highest resident memory less what is planned for that step. Quantised and 16-bit bases bring libraries and
buffers of their own, so each form of a base has its own figure. They are in `machine.json` in the user's cache.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import PlanError
from ..files import read_text
from ..gguf import cache_directory
from ..training.schema import Recipe
from ..version import __version__

FORMAT = 1  # raise it when what is measured changes
FORMS = ("fp32", "bf16", "int8", "nf4", "fp4")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Bytes of a process that trains on a base in one form, and products a second in its dtype (operations)."""

    process_bytes: int
    operations: float


def machine(form: str, say: Any = None) -> Machine:
    """This machine's figures for a base in a form ("fp32", "bf16", "int8", "nf4", "fp4"), measured when first asked for.

    Args:
        say: is told when something is measured, which takes some ten seconds.

    Raises:
        PlanError: the measuring run failed.
    """
    path = cache_directory() / "machine.json"
    kept = read(path)
    key = " ".join([form, platform.node(), f"{os.cpu_count()} threads {torch.get_num_threads()}", *versions()])
    if key not in kept:
        if say is not None:
            say(f"Measuring this machine once for {form} bases (kept in {path}) …")
        kept = read(path) | {key: measured(form)}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(kept, indent=1), encoding="utf-8")
        os.replace(temporary, path)
    return Machine(**kept[key])


def versions() -> list[str]:
    import transformers

    return [f"graftlm {__version__} torch {torch.__version__} transformers {transformers.__version__} format {FORMAT}"]


def read(path: Path) -> dict[str, Any]:
    """What is kept; nothing where the file is not there or not whole."""
    try:
        found = json.loads(read_text(path, PlanError))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def measuring_recipe(form: str, folder: str) -> Recipe:
    """The run that shows what a process takes besides its plan."""
    return Recipe.from_dict({
        "quantization": form if form in ("int8", "nf4", "fp4") else None, "dtype": "bf16" if form == "bf16" else "fp32",
        "data": {"source": "quotes", "holdout": 0, "max_examples": 8},
        "training": {"batch_size": 4, "max_steps": 2, "eval_strategy": "no", "save_strategy": "no"},
        "output_dir": f"{folder}/out",
    })  # fmt: skip


def measured(form: str) -> dict[str, float]:
    """The figures, from a run in a process of its own."""
    from .rows import longest_batch, rows_of
    from .step import step_memory

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", __name__, form, folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        recipe = measuring_recipe(form, folder)
    if done.returncode:
        raise PlanError(f"this machine could not be measured: {done.stderr.strip().splitlines()[-1:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    planned = step_memory(recipe, longest_batch(recipe, rows_of(recipe))).total
    return {"process_bytes": max(found["peak"] - planned, 0), "operations": operations(form)}


def operations(form: str) -> float:
    """Operations a second of a product [512, 1024] x [1024, 1024], the best of some."""
    from ..kernels.linear import plain_product

    dtype = torch.bfloat16 if form == "bf16" else torch.float32
    x, weight = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    plain_product(x, weight)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        plain_product(x, weight)
        best = min(best, time.perf_counter() - start)
    return 2 * 512 * 1024 * 1024 / best


def main(form: str, folder: str) -> None:
    """The measuring process: a run, and its highest resident memory."""
    from ..training.meters import peak_memory
    from ..training.recipes import run

    run(measuring_recipe(form, folder), quiet=True)
    print(json.dumps({"peak": peak_memory()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
