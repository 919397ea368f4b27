"""What a run is planned for: this machine's free memory, or a number of bytes."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import PlanError, nearest

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
NAMES = ("auto", "cpu")


@dataclass(frozen=True)
class Device:
    """A name, and the bytes that a process may take there."""

    name: str
    free_bytes: int


def device(name: str = "auto") -> Device:
    """The device of a name: "auto" or "cpu" (this machine's memory that is free now), or an amount such as "16GiB".

    Raises:
        PlanError: an unknown name, an amount that is not above 0, GPUs: their plans are not checked on one yet.
    """
    if name in NAMES:
        return Device("cpu", free_memory())
    found = re.fullmatch(r"\s*(-?[\d.]+)\s*([kKmMgGtT]?i?[bB]?)\s*", name)
    if found and found[2].upper() in UNITS and found[1].count(".") < 2:
        amount = float(found[1]) * UNITS[found[2].upper()]
        if amount < 1:
            raise PlanError(f"--device {name}: expected an amount of memory above 0")
        return Device(name.strip(), int(amount))
    raise PlanError(
        f"unknown device {name!r}: expected auto, cpu, or an amount of memory such as 16GiB{nearest(name, NAMES)}. Plans "
        "are of the CPU's engine; GPUs by name are not planned yet."
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
