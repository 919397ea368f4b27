"""Numbers as people read them, the same in the terminal and in the report."""

from __future__ import annotations

import math

from .result import ComparisonResult, Row

DASH = "–"


def number(value: float | None, digits: int = 3) -> str:
    """A fixed number of decimals; a dash for None and NaN."""
    return DASH if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def perplexity(value: float | None) -> str:
    """Decimals only where they are of interest."""
    return number(value, 2 if value is None or value < 1000 else 0)


def percent(value: float | None, digits: int = 1) -> str:
    return DASH if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f} %"


def share(part: float | None, whole: float) -> str:
    """A share with as many digits as it needs to be seen."""
    if part is None or not whole:
        return DASH
    value = 100 * part / whole
    return f"{value:.1f} %" if value >= 1 else f"{value:.2g} %"


def size(count: float | None) -> str:
    """Bytes."""
    if count is None:
        return DASH
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}" if count < 9.95 * factor else f"{count / factor:,.0f} {unit}"
    return f"{count:.0f} B"


def count(value: float | None) -> str:
    return DASH if value is None else f"{value:,.0f}"


def short(value: float) -> str:
    """1.2k, 3M: for axes."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:g}{unit}"
    return f"{value:g}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return DASH
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


def spread(row: Row, key: str, show=number) -> str:  # type: ignore[no-untyped-def]
    """A row's mean, with ± its standard deviation where there are several seeds."""
    deviation = row.deviation(key)
    return show(row.mean(key)) + (f" ± {show(deviation)}" if deviation is not None else "")


def verdict(result: ComparisonResult) -> str:
    """One sentence: what came out."""
    best = result.best
    if best is None:
        return "No method finished."
    key = result.quality
    show = percent if key == "accuracy" else number
    before, after = result.before(best, key), best.mean(key)
    parameters = best.mean("trainable_parameters")
    return (
        f"{best.label} takes held-out {key} from {show(before)} to {show(after)} with {count(parameters)} trained "
        f"parameters ({share(parameters, result.base_parameters)} of the base)."
    )
