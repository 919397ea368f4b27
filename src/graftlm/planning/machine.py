"""What a machine is measured for once: memory of the process itself, and how fast it trains. It is kept.

The process (interpreter, libraries, threads' buffers) is measured by a real run: three steps on a random base of some width
in a fresh process, its highest resident memory less base, adapter, optimizer and what the heap holds for storages that come
and go (glibc tells; of another C library's heap it is planned). The run evaluates and generates nothing: that memory is
planned for, and would be counted twice. Quantised and 16-bit bases bring libraries and buffers of their own,
so each form of a base has its own figure. They are in `machine.json` in the user's cache.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import PlanError
from ..files import read_text
from ..gguf import cache_directory
from ..training.meters import STATUS
from ..training.schema import Recipe
from ..version import __version__

if TYPE_CHECKING:
    from .step import Work

FORMAT = 6  # raise it when what is measured changes
WIDE, NARROW = (640, 6), (256, 6)  # width of a base, and its blocks: of the run whose memory is measured; of short steps
RUN = 2, 32  # rows of that run, tokens of each: few, so that it shows the process and not its activations
STEPS = ((NARROW, (1, 32)), (NARROW, (4, 96)), ((1024, 3), (2, 32)), ((1024, 3), (4, 96)), (WIDE, (2, 64)))
"""Bases and batches whose steps are timed: calls, small operations and products each make up most of one of them."""
ROUNDS = 5
FASTEST_CALLS = 1e6  # a second, whatever they do


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a process takes that trains on a base in one form.

    Attributes:
        process_bytes: of the process, besides what is planned for a step.
        start_bytes: of the process when its base is loaded, besides the base.
        step_operations: a second, of the products of training steps.
        bandwidth: bytes a second that all else in training steps reads and writes.
        call_seconds: that a call takes whatever its size.
    """

    process_bytes: int
    start_bytes: int
    step_operations: float
    bandwidth: float
    call_seconds: float


def machine(form: str, say: Any = None) -> Machine:
    """This machine's figures for a base in a form ("fp32", "bf16", "int8", "nf4", "fp4"), measured when first asked for.

    Args:
        say: is told when something is measured, which takes some twenty seconds.

    Raises:
        PlanError: the measuring run failed.
    """
    path, name = kept_in(), key(form)
    kept = read(path)
    if name not in kept:
        if say is not None:
            say(f"Measuring this machine once for {form} bases (kept in {path}) …")
        kept = read(path) | {name: measured(form)}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(kept, indent=1), encoding="utf-8")
        os.replace(temporary, path)
    return Machine(**kept[name])


def known(form: str) -> Machine | None:
    """The figures, where they were measured before."""
    found = read(kept_in()).get(key(form))
    return Machine(**found) if found else None


def kept_in() -> Path:
    return cache_directory() / "machine.json"


def key(form: str) -> str:
    """What the figures hold for: the form, this machine and the versions."""
    return " ".join([form, platform.node(), f"{os.cpu_count()} threads {torch.get_num_threads()}", *versions()])


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


def measuring_recipe(form: str, folder: Path) -> Recipe:
    """The run that shows what a process takes besides its plan."""
    return Recipe.from_dict({
        "base": str(folder / "base"), "quantization": form if form in ("int8", "nf4", "fp4") else None,
        "dtype": "bf16" if form == "bf16" else "fp32", "data": {"source": str(folder / "rows.jsonl"), "holdout": 0},
        "training": {"batch_size": RUN[0], "max_steps": 3, "eval_strategy": "no", "save_strategy": "no"},
        "output_dir": str(folder / "out"),
    })  # fmt: skip


def make_base(folder: Path, width: int, blocks: int) -> None:
    """A random base with the bundled tokenizer, and rows to train on."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from ..bundled import base_path

    config = LlamaConfig(
        vocab_size=4096, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=blocks,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        LlamaForCausalLM(config).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(base_path()).save_pretrained(folder / "base")
    line = json.dumps({"text": " ".join(["the"] * RUN[1])})
    (folder / "rows.jsonl").write_text("\n".join([line] * 2 * RUN[0]), encoding="utf-8")


def measured(form: str) -> dict[str, float]:
    """The figures, from runs in a process of its own."""
    from .rows import longest_batch, rows_given, rows_of
    from .skeleton import config_of
    from .step import short_cuts, step_memory

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for shape in {WIDE, *(shape for shape, _ in STEPS)}:
            make_base(place(folder, shape), *shape)
        done = subprocess.run([sys.executable, "-m", __name__, form, name], capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise PlanError(f"this machine could not be measured: {last}")
        found = json.loads(done.stdout.strip().splitlines()[-1])
        recipe = measuring_recipe(form, place(folder, WIDE))
        rows, forms = rows_of(recipe), short_cuts(recipe, config_of(recipe)[0])
        step = step_memory(recipe, longest_batch(recipe, rows), forms=forms)
        works = []
        for shape, (count, length) in STEPS:
            recipe = measuring_recipe(form, place(folder, shape)).replace(f"training.batch_size={count}")
            works.append(step_memory(recipe, longest_batch(recipe, rows_given(count, length)), forms=forms).work)
    held = step.gradients + step.kept + step.workspace + step.allocator if found["held"] is None else found["held"]
    process = max(found["peak"] - rows.data_bytes - step.base - step.adapter - step.optimizer - held, 0)
    rates = fitted(works, found["seconds"], operations(form), bandwidth())
    return {"process_bytes": process, "start_bytes": found["start"]} | rates


def place(folder: Path, shape: tuple[int, int]) -> Path:
    """Where a base of a shape and its rows are."""
    return folder / f"{shape[0]}x{shape[1]}"


def fitted(works: Sequence[Work], seconds: Sequence[float], fastest: float, bandwidth: float) -> dict[str, float]:
    """The rates that explain the seconds of steps the best, by least squares of errors relative to what was measured.

    Args:
        fastest, bandwidth: of a product and of a sum that this machine was seen to make; steps are no faster. (A product
            that was timed in a slow moment may be slower than whole steps: then the fastest of these counts.)
    """
    fastest = max(fastest, *(w.operations / s for w, s in zip(works, seconds, strict=True)))
    most = fastest, bandwidth, FASTEST_CALLS
    counted = torch.tensor([(w.operations, w.moved, w.calls) for w in works], dtype=torch.float64)
    shares = counted / torch.tensor(most, dtype=torch.float64) / torch.tensor(seconds, dtype=torch.float64)[:, None]
    factors = [1 + extra for extra in non_negative(shares, 1 - shares.sum(1))]
    rate, moved, calls = (m / f for m, f in zip(most, factors, strict=True))
    return {"step_operations": rate, "bandwidth": moved, "call_seconds": 1 / calls}


def non_negative(a: Tensor, b: Tensor) -> list[float]:
    """The least squares solution of ``a x = b`` of which nothing is below zero; a [N, few], b [N]. Every choice of columns
    that are not zero is tried."""
    best, found = float(b.square().sum()), [0.0] * a.shape[1]
    for count in range(1, a.shape[1] + 1):
        for columns in itertools.combinations(range(a.shape[1]), count):
            x = torch.linalg.lstsq(a[:, columns], b[:, None], driver="gelsd").solution[:, 0]
            error = float((a[:, columns] @ x - b).square().sum())
            if error < best and bool((x >= 0).all()):
                best, found = error, [0.0] * a.shape[1]
                for column, value in zip(columns, x.tolist(), strict=True):
                    found[column] = value
    return found


def bandwidth() -> float:
    """Bytes a second that a sum of two large tensors reads and writes, the best of some."""
    x, y, out = (torch.ones(1 << 22) for _ in range(3))
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        torch.add(x, y, out=out)
        best = min(best, time.perf_counter() - start)
    return 3 * x.numel() * x.element_size() / best


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
    """The measuring process: a run, its highest resident memory, and the time of steps."""
    from ..training.meters import memory_now, peak_memory
    from ..training.recipes import run

    start, noted = memory_now(), heap_notes()
    run(measuring_recipe(form, place(Path(folder), WIDE)), callbacks=[noted], quiet=True)
    found = {"start": start, "peak": peak_memory(), "held": noted.held()}
    print(json.dumps(found | {"seconds": step_times(form, Path(folder))}))


def heap_notes() -> Any:
    """A callback that notes the heap before the first step and after the last one."""
    from transformers import TrainerCallback

    class HeapNotes(TrainerCallback):
        def __init__(self) -> None:
            self.states: list[tuple[int, int, int] | None] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.states = self.states or [heap_state()]

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            self.states.append(heap_state())

        def held(self) -> int | None:
            """Bytes that the heap holds for what comes and goes in steps: what it has grown by, without what stays in use,
            and what was free in it before."""
            before, after = self.states
            if before is None or after is None:
                return None
            return (after[0] - before[0]) - (after[1] - before[1]) + before[2]

    return HeapNotes()


def heap_state() -> tuple[int, int, int] | None:
    """Bytes that are resident and of no file, that are in use in the heap, and that are free in it; None where the C library
    is not glibc (2.33 or later)."""

    class Info(ctypes.Structure):  # struct mallinfo2 of malloc.h
        _fields_ = [(f"f{i}", ctypes.c_size_t) for i in range(10)]

    try:
        ask = ctypes.CDLL("libc.so.6").mallinfo2
        resident = re.search(r"RssAnon:\s+(\d+) kB", STATUS.read_text(encoding="ascii"))
    except (OSError, AttributeError):
        return None
    ask.restype = Info
    info = ask()
    return None if resident is None else (1024 * int(resident[1]), info.f7, info.f8)  # uordblks, fordblks


def step_times(form: str, folder: Path) -> list[float]:
    """Seconds of each of `STEPS`, the best of some: they are made in turns, so that a slow moment meets them all."""
    from ..methods import LoraConfig
    from ..model import get_peft_model
    from ..training.bases import resolve_base

    models = {}
    for shape in {shape for shape, _ in STEPS}:
        recipe = measuring_recipe(form, place(folder, shape))
        base, _ = resolve_base(recipe.base, dtype=recipe.dtype, quantization=recipe.quantization)
        models[shape] = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM")).train()

    def seconds(shape: tuple[int, int], batch: tuple[int, int]) -> float:
        ids, start = torch.full(batch, 3), time.perf_counter()
        models[shape](input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        return time.perf_counter() - start

    rounds = [[seconds(*each) for each in STEPS] for _ in range(ROUNDS)]
    return [min(times) for times in zip(*rounds, strict=True)]


if __name__ == "__main__":
    main(*sys.argv[1:])
