"""Greedy generation under one LoRA adapter: GraftLM's tokens a second beside HF PEFT's, and whether the texts are the same.

    python benchmarks/generation.py                 # prints a table; about a minute
    python benchmarks/generation.py --device cuda --json out.json

Both libraries hold the same adapter over the same random base in one process and generate in turns; ratios of medians.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import workloads
from mixed_batch import NEW, alternate, base, decode, rows, with_adapters

LENGTH = 32


def measure(count: int, rounds: int) -> dict[str, Any]:
    """One batch of `count` rows."""
    import peft

    import graftlm

    shared = base()
    ours, theirs = with_adapters(graftlm, copy.deepcopy(shared), 1), with_adapters(peft, shared, 1)
    inputs = rows(LENGTH, count)
    calls = [decode(model, inputs, None) for model in (theirs, ours)]
    same = bool((calls[0]() == calls[1]()).all())
    seconds = alternate(calls, rounds)
    speeds = {name: count * NEW / s for name, s in zip(("peft", "graftlm"), seconds, strict=True)}
    return {"rows": count, "tokens_per_second": speeds, "ratio": seconds[0] / seconds[1], "same_tokens": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16], help="sizes of the batches")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    workloads.device = args.device
    found = [measure(count, args.rounds) for count in args.rows]
    for row in found:
        speed = row["tokens_per_second"]["graftlm"]
        same = "the same tokens" if row["same_tokens"] else "OTHER TOKENS"
        print(f"{row['rows']:3} rows  {speed:8.0f} tokens/s  HF PEFT's time / GraftLM's {row['ratio']:.2f}  {same}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
