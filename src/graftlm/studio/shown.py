"""Numbers and times for people: the templates' filters."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Iterable, Sequence
from typing import Any


def size(count: float | None) -> str:
    """Bytes: 1.2 GiB."""
    if count is None:
        return "–"
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def duration(seconds: float | None) -> str:
    """40 s, 3 min 20 s, 2 h 5 min."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 6000 else f"{whole // 3600} h {whole % 3600 // 60} min"


def span(seconds: Sequence[float] | None) -> str:
    """A time between two: 40 s – 3 min 20 s."""
    return "–" if seconds is None else " – ".join(map(duration, seconds))


def moment(seconds: float | None) -> str:
    """Date and time of this machine."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else "–"


def number(value: float | None, digits: int = 4) -> str:
    """So many digits, and never powers of ten for what is large."""
    if value is None:
        return "–"
    return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"


def share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def whole(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def as_json(value: Any) -> str:
    """For a data attribute; the template escapes it."""
    return json.dumps(value, ensure_ascii=False)


def combine(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The keys of both; the second's values where both have one."""
    return first | second


def mark(rows: Iterable[Any]) -> str:
    """A short text that is another one when rows of the index, or their order, are."""
    return f"{zlib.crc32(repr([row.model_dump() for row in rows]).encode()):08x}"


FILTERS = {f.__name__: f for f in (size, duration, span, moment, number, share, whole, as_json, combine)}
