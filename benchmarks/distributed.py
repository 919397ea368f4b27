"""Two processes of one core each against one process with two cores: seconds a step of the same training, in turns.

    python benchmarks/distributed.py --base smollm2 --rounds 2

Every step trains as many rows whichever way. A third way says where the difference goes: two processes of one core with half
of the rows each that know nothing of each other, so `alone / one` is the price of two small processes (their fixed costs,
and weights that are read twice), `two / alone` that of the exchange and of waiting for the slower half.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

ROWS = 8  # a step, over all processes
WARM = 3  # steps before the clock: passes are tried out, ways of products chosen


class Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_step_begin(self, *given: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *given: Any, **kwargs: Any) -> None:
        self.steps.append(time.perf_counter() - self.started)


def train(given: argparse.Namespace) -> None:
    """One process's run: seconds a step, and what is exchanged, into a file."""
    from graftlm.training import Recipe, run

    count = int(os.environ.get("WORLD_SIZE", 1))
    rows = ROWS // (2 if given.worker == "alone" else count)
    training = {
        "max_steps": WARM + given.steps, "batch_size": rows, "eval_strategy": "no", "save_strategy": "no",
        "load_best": False, "strategy": given.strategy, "seed": int(os.environ.get("SEED", 0)),
    }  # fmt: skip
    data = {"source": "tweets", "max_examples": 200, "max_eval_examples": 2}
    clock = Clock()
    values = {"base": given.base, "data": data, "training": training, "output_dir": str(given.folder / "out")}
    metrics = run(Recipe.from_dict(values), callbacks=[clock], quiet=True).metrics
    exchanged = {key: metrics[key] for key in ("gradient_bytes", "gathered_bytes") if key in metrics}
    if os.environ.get("RANK", "0") == "0":
        told = {"seconds": statistics.mean(clock.steps[WARM:]), **exchanged}
        (given.folder / "told.json").write_text(json.dumps(told), encoding="utf-8")


def measured(way: str, given: argparse.Namespace, folder: Path) -> dict[str, float]:
    """A fresh run of a way."""
    settings = ["--base", given.base, "--steps", str(given.steps), "--strategy", given.strategy, "--worker", way]
    threads = "2" if way == "one" else "1"
    launcher = [sys.executable]
    if way == "two":
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    started = []
    for i in range(2 if way == "alone" else 1):
        own = folder / str(i)
        own.mkdir(parents=True)
        environment = os.environ | {"OMP_NUM_THREADS": threads, "SEED": str(i)}
        command = [*launcher, __file__, *settings, "--folder", str(own)]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
    codes = [one.wait() for one in started]
    if any(codes):
        raise SystemExit(f"{way}: a process failed")
    told = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*/told.json")]
    return {**told[0], "seconds": statistics.mean(t["seconds"] for t in told)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("--ways", nargs="+", default=["one", "two", "alone"])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        train(given)
        return
    found: dict[str, list[float]] = {way: [] for way in given.ways}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(given.rounds):
            for way in given.ways if turn % 2 == 0 else reversed(given.ways):
                told = measured(way, given, Path(folder) / f"{turn}-{way}")
                found[way].append(told["seconds"])
                print(way, json.dumps(told), flush=True)
    medians = {way: statistics.median(values) for way, values in found.items()}
    for a, b in (("one", "two"), ("one", "alone"), ("alone", "two")):
        if a in medians and b in medians:
            print(f"throughput of {b} / {a}: {medians[a] / medians[b]:.3f}")


if __name__ == "__main__":
    main()
