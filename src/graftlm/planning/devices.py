"""What a run is planned for: this machine's free memory, or a number of bytes."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import PlanError, nearest

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
NAMES = ("auto", "cpu")
GPUS = {
    "t4": 16, "l4": 24, "a10": 24, "a10g": 24, "rtx3090": 24, "rtx4090": 24, "rtx5090": 32, "v100": 32, "a100-40": 40,
    "l40s": 48, "a6000": 48, "a100": 80, "h100": 80, "h200": 141, "b200": 180,
}  # fmt: skip
"""GB of memory by the names of their makers."""


@dataclass(frozen=True)
class Device:
    """A name, the bytes that a process may take there, and whether it is a GPU: its plans are not checked on one."""

    name: str
    free_bytes: int
    gpu: bool = False


def device(name: str = "auto") -> Device:
    """The device of a name: "auto" or "cpu" (this machine's memory that is free now), a GPU such as "h100" (all of its
    memory), "cuda" (this machine's), or an amount of main memory such as "16GiB".

    Raises:
        PlanError: an unknown name, an amount that is not above 0, "cuda" where there is none.
    """
    if name in NAMES:
        return Device("cpu", free_memory())
    plain = name.strip().lower().replace(" ", "")
    if plain in GPUS:
        return Device(plain, GPUS[plain] * 10**9, gpu=True)
    if plain == "cuda":
        if not torch.cuda.is_available():
            raise PlanError(f"--device cuda: torch finds no GPU here; name one, as in {', '.join(list(GPUS)[-3:])}")
        return Device(plain, torch.cuda.mem_get_info()[0], gpu=True)
    found = re.fullmatch(r"\s*(-?[\d.]+)\s*([kKmMgGtT]?i?[bB]?)\s*", name)
    if found and found[2].upper() in UNITS and found[1].count(".") < 2:
        amount = float(found[1]) * UNITS[found[2].upper()]
        if amount < 1:
            raise PlanError(f"--device {name}: expected an amount of memory above 0")
        return Device(name.strip(), int(amount))
    known = [*NAMES, "cuda", *GPUS]
    raise PlanError(
        f"unknown device {name!r}: expected auto, cpu, an amount of memory such as 16GiB, or a GPU of {', '.join(GPUS)}"
        f"{nearest(name, known)}"
    )


def free_memory() -> int:
    """Bytes that this machine could still give to a process.

    Raises:
        PlanError: this system does not say.
    """
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable"):
                return min(1024 * int(line.split()[1]), limit())
    except OSError:
        pass
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    raise PlanError("this system does not say how much memory is free: name an amount, as in --device 16GiB")


def limit() -> int:
    """The control group's limit on memory; no limit where there is none."""
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 2**63
