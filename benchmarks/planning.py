"""Planned against real memory: every point is a whole run of a recipe in a process of its own.

    python benchmarks/planning.py                          # measure all points that --json does not hold yet, then compare
    python benchmarks/planning.py --only llama lora        # points whose names hold all of these words
    python benchmarks/planning.py --times                  # seconds of a step of measured points, on a quiet machine;
                                                           # again: the shorter time counts
    python benchmarks/planning.py --compare --json planning.json     # plan what was measured, and print the table

A run loads a random checkpoint of a shape (made once, in a folder that is kept), trains two updates and saves the adapter;
what is measured is the highest resident memory of the process from its start to its end (VmHWM, with what
the Trainer's own meter resets put together). It exits with an error if a plan is more than 8 % too low, fewer than 90 % are
within 10 %, or (after --times) fewer than 80 % of the times within 30 %. Points that are held out are counted apart.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from planning_points import build, held_out, points, recipe

TOO_LOW, WITHIN, SHARE = 0.08, 0.10, 0.90
NEAR, NEAR_SHARE = 0.30, 0.80  # of times


def marks() -> Any:
    """A callback that notes memory before the Trainer's meter starts it anew, and each step's seconds, by the clock and of
    processors."""
    from transformers import TrainerCallback

    from graftlm.training.meters import memory_now, peak_memory

    class Marks(TrainerCallback):
        def __init__(self) -> None:
            self.before, self.loaded = 0, 0
            self.steps: list[tuple[float, float]] = []

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.before, self.loaded = max(self.before, peak_memory()), memory_now()

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.steps.append((time.perf_counter(), time.process_time()))

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            began = self.steps[-1]
            self.steps[-1] = time.perf_counter() - began[0], time.process_time() - began[1]

    return Marks()


def worker(point: dict[str, Any], folder: Path) -> None:
    """Run a point; prints its figures as JSON."""
    start = time.perf_counter()
    import torch

    from graftlm.training import run, train_together
    from graftlm.training.meters import memory_now, peak_memory

    noted, imported = marks(), memory_now()
    if point.get("joint"):
        train_together([recipe(point, folder, i) for i in range(point["joint"])], quiet=True)
        took = 0.0, 0.0
    else:
        run(recipe(point, folder), callbacks=[noted], quiet=True)
        took = noted.steps[-1]
    print(json.dumps({
        "peak": max(noted.before, peak_memory()), "before": noted.before, "loaded": noted.loaded, "imported": imported,
        "step_seconds": took[0], "step_cpu": took[1], "seconds": time.perf_counter() - start,
        "threads": torch.get_num_threads(),
    }))  # fmt: skip


def time_all(rows: list[dict[str, Any]], everything: list[dict[str, Any]], path: Path, folder: Path, limit: float) -> None:
    """Time the second to sixth step of points one after the other in this process, those first that were timed the least
    often; the shortest counts. All that belongs to other measurements is left out: evaluations, joint runs, bases of above
    half a billion."""
    from graftlm.training import run

    start = time.perf_counter()
    left_out = [r for r in rows if r.get("joint") or r.get("holdout") or r["shape"] in ("llama-1.1b", "bloom-0.5b")]
    for row in sorted((r for r in rows if r not in left_out), key=lambda r: r.get("timed", 0)):
        if time.perf_counter() - start > limit:
            return
        noted = marks()
        run(recipe(row, folder).replace("training.max_steps=6"), callbacks=[noted], quiet=True)
        shortest = min(clock for clock, _ in noted.steps[1:])
        row |= {"quiet_seconds": min(shortest, row.get("quiet_seconds") or shortest), "timed": row.get("timed", 0) + 1}
        path.write_text(json.dumps(everything, indent=1), encoding="utf-8")
        print(f"{row['name']}: {shortest:.3f} s", flush=True)


def measure(point: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a point in a process of its own."""
    build(point["shape"], folder)
    command = [sys.executable, __file__, "--worker", json.dumps(point), "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return point | {"error": done.stderr[-1500:]}
    return point | json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("planning.json"), help="where measured points are kept")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "graftlm-planning", help="checkpoints")
    parser.add_argument("--only", nargs="+", default=[], help="words that a point's name must hold")
    parser.add_argument("--compare", action="store_true", help="measure nothing: plan what was measured")
    parser.add_argument("--times", type=float, nargs="?", const=3600.0, help="time points again, for so many seconds")
    parser.add_argument("--worker", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.worker:
        worker(json.loads(args.worker), args.folder)
        return
    rows = json.loads(args.json.read_text(encoding="utf-8")) if args.json.is_file() else []
    if args.times:
        chosen = [row for row in rows if all(w in row["name"] for w in args.only)]
        time_all(chosen, rows, args.json, args.folder, args.times)
        return
    have = {row["name"] for row in rows if "error" not in row}
    for each in (*points(), *held_out()):
        if args.compare or each["name"] in have or not all(word in each["name"] for word in args.only):
            continue
        start = time.perf_counter()
        rows = [r for r in rows if r["name"] != each["name"]] + [measure(each, args.folder)]
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        print(f"{each['name']}: {rows[-1].get('peak', 0) / 2**20:.0f} MiB, {time.perf_counter() - start:.0f} s", flush=True)
    if not compare(rows, args.folder):
        raise SystemExit(1)


def compare(rows: list[dict[str, Any]], folder: Path) -> bool:
    """Plan what was measured with as many threads as there are now, and print the table; whether the plans are as close as
    they are to be."""
    import torch

    from graftlm.planning import plan

    print("| run | measured MiB | planned MiB | off | measured s a step | planned |\n|---|--:|--:|--:|--:|--:|")
    apart = {each["name"] for each in held_out()}
    errors: dict[bool, list[float]] = {False: [], True: []}
    ratios = []
    now = torch.get_num_threads()
    for row in (r for r in rows if "error" not in r and r.get("threads", now) == now):
        recipes = [recipe(row, folder, i) for i in range(row.get("joint", 1))]
        planned = plan(recipes, say=lambda text: print(text, file=sys.stderr))
        error, times = planned.peak_bytes / row["peak"] - 1, "| |"
        errors[row["name"] in apart].append(error)
        if row.get("quiet_seconds"):
            ratios.append(planned.step_seconds / row["quiet_seconds"] - 1)
            times = f" {row['quiet_seconds']:.2f} | {planned.step_seconds:.2f} |"
        print(f"| {row['name']} | {row['peak'] >> 20:,} | {planned.peak_bytes >> 20:,} | {error:+.1%} |{times}", flush=True)
    for name, found in (("Points", errors[False]), ("Held-out points", errors[True])):
        close = sum(abs(e) <= WITHIN for e in found)
        if found:
            print(
                f"{name}: {close} of {len(found)} within {WITHIN:.0%}; lowest {min(found):+.1%}, highest {max(found):+.1%}"
            )
    near = sum(abs(r) <= NEAR for r in ratios)
    if ratios:
        print(f"Times: {near} of {len(ratios)} within {NEAR:.0%}")
    found = [e for part in errors.values() for e in part]
    close = sum(abs(e) <= WITHIN for e in found)
    return close >= SHARE * len(found) and min(found) >= -TOO_LOW and near >= NEAR_SHARE * len(ratios)


if __name__ == "__main__":
    main()
