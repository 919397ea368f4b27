"""Two processes of one core each against one process with two cores: tokens a second of the same training, in turns.

    python benchmarks/distributed.py --base smollm2 --rounds 2

Each round trains once each way (a fresh start each), and the ratio of the medians is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROWS = 8  # a step, over all processes


def tokens_per_second(base: str, steps: int, count: int, folder: Path) -> float:
    """Of one run in `count` processes, which share two cores."""
    flags = {
        "base": base, "data.source": "tweets", "data.max_examples": 200, "data.max_eval_examples": 2,
        "training.max_steps": steps, "training.batch_size": ROWS // count, "training.eval_strategy": "no",
        "training.save_strategy": "no", "training.load_best": "false", "output_dir": folder,
    }  # fmt: skip
    sets = [part for key, value in flags.items() for part in ("--set", f"{key}={value}")]
    more = ["--processes", str(count)] if count > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": str(2 // count)}
    subprocess.run([sys.executable, "-m", "graftlm", "train", "--quiet", *sets, *more], check=True, env=environment)
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["metrics"]["tokens_per_second"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    found: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(given.rounds):
            for count in (1, 2) if turn % 2 == 0 else (2, 1):
                found[count].append(tokens_per_second(given.base, given.steps, count, Path(folder) / f"{turn}-{count}"))
                print(f"{count} process(es): {found[count][-1]:.0f} tokens/s", flush=True)
    one, two = (statistics.median(found[count]) for count in (1, 2))
    print(f"two processes of one core / one process with two: {two / one:.3f}")


if __name__ == "__main__":
    main()
