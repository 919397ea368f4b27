"""Numbers as people read them, the same in the terminal and in the report."""

from __future__ import annotations

import math

from .findings import Findings, Row

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


def verdict(result: Findings) -> str:
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


def recommendation(result: Findings) -> list[str]:
    """What to take and why, in plain words: a sentence or two each."""
    best = result.best
    if best is None:
        return []
    key, show = result.quality, percent if result.quality == "accuracy" else number
    value, before, seeds = best.mean(key) or 0.0, result.before(best, key), len(best.done)
    if before is not None and (value <= before if key == "accuracy" else value >= before):
        return [f"Take none yet: the best, {best.label}, is no better than the plain base. Train longer, or on more data."]
    over = f" (mean of {seeds} seeds)" if seeds > 1 else ""
    lines = [f"Take {best.label}: its held-out {key}, {spread(best, key, show)}{over}, is the best."]
    margin, own = uncertainty(result, best), best.mean("trainable_parameters") or 0.0
    close = [r for r in result.rows if r.label != best.label and r.done and abs((r.mean(key) or 0.0) - value) <= margin]
    cheaper = [r for r in close if 0 < (r.mean("trainable_parameters") or 0) < 0.7 * own]
    if cheaper:
        small = min(cheaper, key=lambda r: r.mean("trainable_parameters") or 0.0)
        lines.append(
            f"Where size matters, {small.label} does as well within the uncertainty ({show(small.mean(key))}, differences "
            f"under {show(margin)} say nothing) with {own / (small.mean('trainable_parameters') or 1):.1f} times fewer "
            f"trained parameters and a file of {size(small.mean('file_bytes'))}."
        )
    elif close:
        lines.append(f"Within the uncertainty of {show(margin)} are also {', '.join(r.label for r in close)}.")
    if seeds < 3:
        lines.append(
            "One or two seeds do not tell luck from skill: with three (--seed 0 --seed 1 --seed 2) the spread shows."
        )
    kept = [r for r in result.rows if r.done and r.mean("general_loss") is not None]
    if kept:
        least = min(kept, key=forgetting)
        end = "" if least is best or least.label == best.label else f"; that of {best.label} by {forgetting(best):+.3f}"
        lines.append(f"{least.label} forgets least: its loss on general text changes by {forgetting(least):+.3f}{end}.")
    return lines


def forgetting(row: Row) -> float:
    """By how much the loss on general text has grown."""
    return (row.mean("general_loss") or 0.0) - (row.mean("general_loss_before") or 0.0)


def uncertainty(result: Findings, row: Row) -> float:
    """What a difference in quality has to exceed: two standard errors over the seeds, and for an accuracy one standard error
    of so many held-out rows (binomial)."""
    found = 2 * (row.deviation(result.quality) or 0.0) / math.sqrt(max(len(row.done), 1))
    if result.quality == "accuracy" and result.eval_rows:
        right = min(max(row.mean("accuracy") or 0.0, 0.0), 1.0)
        found = max(found, math.sqrt(right * (1 - right) / result.eval_rows))
    return found
