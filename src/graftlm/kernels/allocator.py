"""Memory that a training step frees is kept for the next one (Linux with glibc).

glibc takes blocks above 32 MB from the system and gives them back at once, so that every step has the same gigabytes zeroed
page by page: 10 to 15 % of a step's time. With higher thresholds they stay in the process. It is bounded by a share of the
machine's memory; GRAFTLM_KEEP_MEMORY=0 leaves the allocator alone, and so do MALLOC_ variables of one's own.
"""

from __future__ import annotations

import ctypes
import functools
import os
from contextlib import suppress

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
_SHARE = 8  # at most an eighth of the memory is kept


@functools.cache
def keep_freed_memory() -> bool:
    """Raise the thresholds, once a process; whether it was done."""
    own = any(name.startswith("MALLOC_") for name in os.environ)
    if own or os.environ.get("GRAFTLM_KEEP_MEMORY", "1") == "0" or not hasattr(os, "sysconf"):
        return False
    try:
        library = ctypes.CDLL("libc.so.6")
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        kept = min(memory // _SHARE, 2**31 - 1)
        return bool(
            library.mallopt(-2, 64 << 20) and library.mallopt(_MMAP, min(kept, 2**30)) and library.mallopt(_TRIM, kept)
        )
    except (OSError, ValueError, AttributeError):  # another C library
        return False


def return_freed_memory() -> None:
    """Keep no blocks of a megabyte and more from here on: a base in parts is gathered and freed all the time, and what is
    kept of that is what its parts save."""
    if keep_freed_memory():  # first: it would raise the thresholds later
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(_MMAP, 1 << 20)
        library.mallopt(_TRIM, 1 << 20)
    release_freed_memory()


def release_freed_memory() -> None:
    """Give back to the system what is kept and not used, so that what is measured next counts from there."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
