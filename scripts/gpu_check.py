"""What only a GPU shows, in one command of at most eight minutes: the GPU tests, and the benchmarks against HF PEFT.

    python scripts/gpu_check.py                    # writes gpu-check.json
    python scripts/gpu_check.py --json out.json --only tests generation

Each part runs in a process of its own with a limit of its own. A part that fails or runs out of time is written as such, and
the others go on; the exit code is then 1. Without a GPU it tells what it would do, and leaves with 0.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("graftlm", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "triton")
TAIL = 4000  # characters of a part's output that are kept


@dataclass(frozen=True)
class Part:
    """A command below `ROOT` (arguments of Python) and its limit in seconds. `{json}` stands for a file of results."""

    name: str
    command: tuple[str, ...]
    limit: int


PARTS = (
    Part("tests", ("-m", "pytest", "tests/core/test_gpu.py", "-q"), 130),
    Part(
        "training",
        ("benchmarks/training.py", "lora", "qlora", "prefix", "--dtype", "bfloat16", "--device", "cuda", "--no-memory",
         "--json", "{json}"),
        150,
    ),
    Part("mixed", ("benchmarks/mixed_batch.py", "--device", "cuda", "--rounds", "3", "--json", "{json}"), 80),
    Part("planning", ("benchmarks/planning_gpu.py", "--json", "{json}"), 60),
    Part("generation", ("benchmarks/generation.py", "--device", "cuda", "--json", "{json}"), 60),
)  # fmt: skip


def run_part(part: Part, folder: Path) -> dict[str, Any]:
    """What became of a part: `status` (done, failed, out of time), seconds, the end of its output, its own results."""
    results = folder / f"{part.name}.json"
    command = [sys.executable, *(str(results) if word == "{json}" else word for word in part.command)]
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    start, log = time.perf_counter(), folder / f"{part.name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )  # fmt: skip
        try:
            status = "failed" if process.wait(part.limit) else "done"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
            process.wait()
    found: dict[str, Any] = {"status": status, "seconds": round(time.perf_counter() - start, 1), "limit": part.limit}
    if status != "done":
        found["exit_code"] = process.returncode
    if results.is_file():
        with contextlib.suppress(ValueError):  # cut off while it was written
            found["results"] = json.loads(results.read_text(encoding="utf-8"))
    elif status == "done" and "{json}" in part.command:
        found["status"] = "failed"
    return found | {"output": log.read_text(encoding="utf-8", errors="replace")[-TAIL:]}


def versions() -> dict[str, str | None]:
    """Of Python and of the libraries that matter; None for one that is not there."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def device() -> dict[str, Any] | None:
    """The GPU; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    facts = torch.cuda.get_device_properties(0)
    capability = f"{facts.major}.{facts.minor}"
    return {"name": facts.name, "memory_bytes": facts.total_memory, "capability": capability, "cuda": torch.version.cuda}


def check(parts: Sequence[Part], path: Path, gpu: dict[str, Any] | None) -> bool:
    """Run the parts and write the file anew after each; whether all were done."""
    report: dict[str, Any] = {"versions": versions(), "device": gpu, "parts": {}}
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            found = report["parts"][part.name] = run_part(part, Path(folder))
            path.write_text(json.dumps(report, indent=1), encoding="utf-8")
            print(f"{part.name}: {found['status']} after {found['seconds']} s", flush=True)
    return all(found["status"] == "done" for found in report["parts"].values())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("gpu-check.json"), help="where the results go")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="these parts")
    args = parser.parse_args(arguments)
    parts = [part for part in PARTS if not args.only or part.name in args.only]
    gpu = device()
    if gpu is None:
        print("There is no GPU here. On a machine with one this would run:")
        for part in parts:
            print(f"  {part.name:10} at most {part.limit:3} s: python {' '.join(part.command)}")
        return 0
    done = check(parts, args.json, gpu)
    print(f"Written: {args.json}")
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
