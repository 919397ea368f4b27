"""Training steps of GraftLM and HF PEFT on the documents' shapes, side by side.

    python benchmarks/training.py               # all workloads, fp32 and bf16: about an hour on two cores
    python benchmarks/training.py prefix lora --dtype bfloat16 --rounds 7 --json out.json --plot out.png
    python benchmarks/training.py smollm2 --processor avx2   # as on a processor that has AVX2 only
    python benchmarks/training.py --prepacked   # GraftLM with the weights kept in oneDNN's layout, too
    python benchmarks/training.py --sweep       # families x methods x dtypes, small
    python benchmarks/training.py --overheads   # wrapping, first step, saving, switching, Trainer

Both libraries run in one process on one set of base weights (two models that share them), with the same adapter values and
the same batch, one step of each in turn; what is printed are ratios of medians. First, without dropout, loss and adapter
gradients are compared. Optimisers: AdamW as the documents make it for HF PEFT (001 and 002: torch's default; 003 and 004:
the Trainer's fused one), fused for GraftLM; `same optimiser` is the ratio with the fused one on both sides. The share of the
floor is the useful arithmetic (real tokens, labelled logits, gradients of activations and adapters) over the fastest matrix
product measured in the same run. Peak memory: each library in a process of its own, highest resident memory with the
weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import memory as memory_bench
import workloads
from rivals import Runner, alternate, compare, kept_weights, pair
from training_overheads import overheads
from training_sweep import FAMILIES, sweep
from workloads import WORKLOADS, Workload, batch, load, wrap

AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
GOALS = {  # of the project: time ratio fp32, bf16; share of HF PEFT's peak fp32, bf16
    "prefix": (3.8, 4.5, 0.72, 0.72), "prompt": (1.8, 3.2, 0.43, 0.32), "ptuning": (1.2, 1.45, 0.95, 0.95),
    "ptuning-lstm": (1.2, 1.45, 0.95, 0.95), "accumulation": (1.4, 2.0, 1.3, 1.3), "lora": (1.4, 1.6, 0.87, 0.87),
    "qlora": (1.3, 1.8, 0.60, 0.60), "smollm2": (1.3, 1.6, 1.0, 1.0), "smollm2-qlora": (1.3, 1.6, 1.0, 1.0),
}  # fmt: skip


# -- floor ---------------------------------------------------------------------------------------------------------------
def peak_flops(dtype: Any) -> float:
    """The fastest matrix product of this machine, by torch's default or oneDNN, in FLOP/s."""
    import torch
    import torch.nn.functional as F

    from graftlm.kernels.linear import working_dtype

    best, dtype = 0.0, working_dtype(dtype, torch.device("cpu"))  # the peak of a processor without bf16 is fp32's
    for rows, width in ((1024, 2048), (2048, 4096)):
        x, weight = (torch.randn(size, width).to(workloads.device, dtype) for size in (rows, width))
        calls = [lambda: F.linear(x, weight)]  # noqa: B023
        if workloads.device == "cpu" and torch.backends.mkldnn.is_available():
            calls.append(lambda: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""))  # noqa: B023
        for call in calls:
            call()
            for _ in range(5):
                workloads.synchronize()
                start = time.perf_counter()
                call()
                workloads.synchronize()
                best = max(best, 2 * rows * width * width / (time.perf_counter() - start))
    return best


def useful_flops(work: Workload, model: Any) -> float:
    """Arithmetic that a step cannot do without: 2 a weight and token forward, 2 for the gradient of the activations, 2 more
    for that of a trained weight; attention over real tokens only."""
    base = model.get_base_model()
    head = base.get_output_embeddings()
    config = base.config
    virtual = work.settings[1].get("num_virtual_tokens", 0)
    prefix = virtual if work.settings[0] == "PrefixTuningConfig" else 0
    tokens = sum(work.lengths) + (virtual - prefix)  # virtual tokens once
    labelled = sum(work.labelled or length - (virtual == 0) for length in work.lengths)
    total = 4.0 * head.weight.shape[0] * head.weight.shape[1] * labelled
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dim() == 2 and "embedding" not in name:
            total += 6.0 * parameter.numel() * (tokens if "lora_" in name else virtual)
    for name, module in base.named_modules():
        weight = getattr(module, "weight", None)
        linear = hasattr(module, "in_features") and not name.split(".")[-1].startswith("default") and module is not head
        if linear and weight is not None and not weight.requires_grad and not hasattr(module, "base_layer"):
            total += 4.0 * module.in_features * module.out_features * tokens
    layers, width = config.num_hidden_layers, config.hidden_size
    seen = sum(length * (length / 2 + virtual) for length in work.lengths)
    return total + 3 * 4.0 * layers * width * seen


# -- memory --------------------------------------------------------------------------------------------------------------
def memory_worker(library: str, name: str, dtype_name: str, folder: str, packed: str) -> None:
    """Highest resident memory of a process that trains three steps with one library; in bytes."""
    import torch

    work, dtype = WORKLOADS[name], getattr(torch, dtype_name)
    model = wrap(__import__(library), load(work, dtype, folder or None), work)
    inputs = batch(work, model.config.vocab_size)
    if work.accumulate:
        inputs["num_items_in_batch"] = (inputs["labels"][:, 1:] != -100).sum()
    runner = Runner(library, model, inputs, work.accumulate)
    memory_bench.settle(workloads.device)
    with kept_weights(model, bool(packed) and library == "graftlm"):
        for _ in range(3):
            runner.step(library == "graftlm" or not work.plain_adamw)
    print(json.dumps({"peak": memory_bench.peak(workloads.device)}))


def peak_memory(library: str, name: str, dtype: str, folder: str, packed: str) -> int:
    command = [sys.executable, __file__, "--device", workloads.device, "--worker", library, name, dtype, folder, packed]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{library} on {name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])["peak"]


# -- reports -------------------------------------------------------------------------------------------------------------
def measure(name: str, dtype_name: str, folder: str | None, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one workload in one dtype."""
    import torch

    work, dtype = WORKLOADS[name], getattr(torch, dtype_name)
    theirs, ours = pair(work, dtype, folder)
    row: dict[str, Any] = {"workload": name, "dtype": dtype_name, "difference": compare(theirs, ours)}
    with kept_weights(ours.model, args.prepacked):
        times = alternate(theirs, ours, work, args.rounds)
    middle = {k: statistics.median(v) for k, v in times.items()}
    own = middle["graftlm"] + middle["graftlm fused"]
    row |= {
        "ratio": (middle["peft"] + middle["peft adamw"]) / own,
        "same_optimiser": (middle["peft"] + middle["peft fused"]) / own,
        "floor": useful_flops(work, ours.model) / peak_flops(dtype) / own,
        "seconds": middle,
    }
    row["peft_floor"] = row["floor"] / row["ratio"]
    del theirs, ours
    gc.collect()
    if not args.no_memory:
        packed = "prepacked" if args.prepacked else ""
        peaks = {library: peak_memory(library, name, dtype_name, folder or "", packed) for library in ("peft", "graftlm")}
        row |= {"peaks": peaks, "memory": peaks["graftlm"] / peaks["peft"]}
    return row


def checkpoint(name: str, place: Path) -> str | None:
    """A quantised workload's base in bf16, to be loaded from; None for the others."""
    import torch

    if WORKLOADS[name].quantized is None:
        return None
    torch.manual_seed(0)
    WORKLOADS[name].base(torch.bfloat16).save_pretrained(place / name)
    return str(place / name)


def line(row: dict[str, Any]) -> str:
    half = row["dtype"] == "bfloat16"
    goal = GOALS[row["workload"]]
    memory = f"{row['memory']:.2f} (<= {goal[2 + half]:.2f})" if "memory" in row else "-"
    return (
        f"{row['workload']:13} {row['dtype']:9} {row['ratio']:5.2f}x (>= {goal[half]:.2f}) same optimiser "
        f"{row['same_optimiser']:5.2f}x  floor {row['floor']:4.0%} (HF PEFT {row['peft_floor']:4.0%})  memory {memory:16} "
        f"difference loss {row['difference']['loss']:.0e} gradient {row['difference']['gradient']:.0e} "
        f"(rounding {row['difference']['rounding']:.0e})"
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of the time ratios, and of memory, by workload."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = [f"{r['workload']}\n{'bf16' if r['dtype'] == 'bfloat16' else 'fp32'}" for r in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4), layout="constrained")
    left.bar(labels, [r["ratio"] for r in rows], color="#3b6ea5")
    left.axhline(1, color="black", linewidth=0.8)
    left.set_ylabel("HF PEFT's time / GraftLM's")
    right.bar(labels, [r.get("memory", 0) for r in rows], color="#7a9e5f")
    right.axhline(1, color="black", linewidth=0.8)
    right.set_ylabel("GraftLM's peak memory / HF PEFT's")
    for axes in (left, right):
        axes.tick_params(axis="x", labelsize=7)
    figure.savefig(path, dpi=110)


def measure_all(args: argparse.Namespace) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for work in args.workloads:
            folder = checkpoint(work, Path(name))
            for dtype in args.dtype:
                rows.append(measure(work, dtype, folder, args))
                print(line(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    if args.plot:
        plot(rows, args.plot)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(WORKLOADS)}; all")
    parser.add_argument("--against", choices=["peft"], default="peft", help="the rival")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each library")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory runs out")
    parser.add_argument("--prepacked", action="store_true", help="GraftLM keeps the weights in oneDNN's layout too")
    parser.add_argument("--sweep", action="store_true", help="families x methods x dtypes x batches")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES, help="of the sweep")
    parser.add_argument("--overheads", action="store_true", help="what is not the step itself")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--plot", type=Path, default=None)
    parser.add_argument("--processor", choices=["avx2"], help="use no instructions beyond these")
    parser.add_argument("--worker", nargs=5, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.processor == "avx2" and any(os.environ.get(k) != v for k, v in AVX2.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | AVX2)
    if unknown := [w for w in args.workloads if w not in WORKLOADS]:
        parser.error(f"no workload {', '.join(unknown)}; there are {', '.join(WORKLOADS)}")
    args.workloads = args.workloads or list(WORKLOADS)
    workloads.device = args.device
    warnings.filterwarnings("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    if args.worker:
        memory_worker(*args.worker)
    elif args.sweep:
        sweep(args)
    elif args.overheads:
        overheads(args)
    else:
        measure_all(args)


if __name__ == "__main__":
    main()
