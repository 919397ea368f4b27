"""Charts as inline SVG, coloured by CSS variables (`--c0` …), so that they follow the page's light or dark theme.

Every series has a colour and a marker shape of its own, and its name stands at the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from . import wording

WIDTH, HEIGHT = 560, 340
LEFT, RIGHT, TOP, BOTTOM = 56, 132, 16, 46
LINE = 15  # height of a label


@dataclass(frozen=True)
class Series:
    """Points (x, y) under a name; `colour` counts through the palette and the marker shapes."""

    label: str
    colour: int
    points: Sequence[tuple[float, float]]
    hint: str = ""


@dataclass(frozen=True)
class Axis:
    """A scale from data to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        at = math.log10(max(value, 1e-12)) if self.log else value
        return self.start + (self.end - self.start) * (at - low) / ((high - low) or 1)

    def ticks(self) -> list[float]:
        if self.log:
            return log_ticks(self.low, self.high)
        step = nice_step(self.high - self.low)
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 10) for i in range(first, int(math.floor(self.high / step + 1e-9)) + 1)]


def nice_step(span: float, wanted: int = 5) -> float:
    """1, 2 or 5 times a power of ten, for about `wanted` ticks."""
    raw = span / wanted if span > 0 else 1.0
    power = 10 ** math.floor(math.log10(raw))
    return next(f * power for f in (1, 2, 5, 10) if f * power >= raw * 0.999)


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten; 2 and 5 times them too where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]
        if len(found) >= 3:
            break
    return found


def axis_around(values: Sequence[float], start: float, end: float, log: bool = False, pad: float = 0.07) -> Axis:
    """An axis that holds the values with some room around."""
    low, high = min(values), max(values)
    if log:
        low, high = low / 1.4, high * 1.4
    else:
        room = (high - low) * pad or abs(high) * 0.1 or 1.0
        low, high = low - room, high + room
    return Axis(low, high, start, end, log)


def marker(colour: int, x: float, y: float, hint: str, size: float = 4.5) -> str:
    """A small shape of the series' own, with a tooltip."""
    n = colour % 5
    shapes = {
        0: f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}"/>',
        1: f'<rect x="{x - size * 0.9:.1f}" y="{y - size * 0.9:.1f}" width="{size * 1.8:.1f}" height="{size * 1.8:.1f}"/>',
        2: f'<path d="M{x:.1f} {y - size * 1.3:.1f}l{size * 1.2:.1f} {size * 2.1:.1f}h{-size * 2.4:.1f}z"/>',
        3: f'<path d="M{x:.1f} {y - size * 1.3:.1f}l{size * 1.3:.1f} {size * 1.3:.1f}l{-size * 1.3:.1f} {size * 1.3:.1f}'
        f'l{-size * 1.3:.1f} {-size * 1.3:.1f}z"/>',
        4: f'<path d="M{x:.1f} {y + size * 1.3:.1f}l{size * 1.2:.1f} {-size * 2.1:.1f}h{-size * 2.4:.1f}z"/>',
    }
    return f'<g class="mark f{colour % 8}"><title>{escape(hint)}</title>{shapes[n]}</g>'


def frame(x: Axis, y: Axis, x_title: str, y_title: str, x_show: Callable, y_show: Callable) -> str:
    """Grid, tick labels and axis titles."""
    parts = []
    for tick in y.ticks():
        at = y(tick)
        parts.append(f'<line class="grid" x1="{x.start}" x2="{x.end}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{x.start - 8}" y="{at + 4:.1f}" text-anchor="end">{escape(y_show(tick))}</text>'
        )
    for tick in x.ticks():
        at = x(tick)
        parts.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{y.start}" y2="{y.start + 4}"/>')
        parts.append(
            f'<text class="tick" x="{at:.1f}" y="{y.start + 18}" text-anchor="middle">{escape(x_show(tick))}</text>'
        )
    parts.append(f'<line class="axis" x1="{x.start}" x2="{x.end}" y1="{y.start}" y2="{y.start}"/>')
    middle = (x.start + x.end) / 2
    parts.append(f'<text class="title" x="{middle:.0f}" y="{y.start + 38}" text-anchor="middle">{escape(x_title)}</text>')
    parts.append(f'<text class="title" x="{x.start}" y="{TOP - 4}" text-anchor="start">{escape(y_title)}</text>')
    return "".join(parts)


def spread_out(wanted: Sequence[float], low: float, high: float, gap: float = LINE) -> list[float]:
    """Heights near the wanted ones, at least `gap` apart."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    below = low - gap
    for i in order:
        below = placed[i] = max(wanted[i], below + gap)
    above = high + gap
    for i in reversed(order):
        above = placed[i] = min(placed[i], above - gap)
    return placed


def reference_line(label: str, value: float, x: Axis, y: Axis) -> str:
    """A dashed line across, for the base."""
    at = y(value)
    return (
        f'<line class="reference" x1="{x.start}" x2="{x.end}" y1="{at:.1f}" y2="{at:.1f}"/>'
        f'<text class="tick" x="{x.start + 4}" y="{at - 5:.1f}">{escape(label)}</text>'
    )


def svg(body: str, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{body}</svg>"
    )


def line_chart(series: Sequence[Series], title: str, x_title: str, y_title: str) -> str:
    """Lines over steps, each named at its end. Empty where there is no point to draw."""
    series = [s for s in series if s.points]
    if not series:
        return ""
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    x = Axis(0, max(xs) or 1, LEFT, WIDTH - RIGHT)
    log = min(ys) > 0 and max(ys) > 8 * min(ys)
    y = axis_around(ys, HEIGHT - BOTTOM, TOP + 8, log=log)
    body = [frame(x, y, x_title, y_title + " (log scale)" * log, wording.short, lambda v: f"{v:g}")]
    ends = spread_out([y(s.points[-1][1]) for s in series], TOP + 10, HEIGHT - BOTTOM)
    for s, end in zip(series, ends, strict=True):
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in s.points)
        body.append(f'<polyline class="line s{s.colour % 8}" points="{path}"/>')
        if len(s.points) <= 25:
            body += [marker(s.colour, x(a), y(b), f"{s.label}: {b:.4g} at step {a:g}", 3) for a, b in s.points]
        last_x, last_y = x(s.points[-1][0]), y(s.points[-1][1])
        body.append(f'<path class="leader" d="M{last_x + 4:.1f} {last_y:.1f}L{WIDTH - RIGHT + 10} {end:.1f}"/>')
        body.append(f'<text class="name t{s.colour % 8}" x="{WIDTH - RIGHT + 14}" y="{end + 4:.1f}">{fit(s.label)}</text>')
    return svg("".join(body), title)


def scatter_chart(
    series: Sequence[Series],
    title: str,
    x_title: str,
    y_title: str,
    y_show: Callable[[float], str],
    reference: tuple[str, float] | None = None,
    higher: bool | None = None,
    x_show: Callable[[float], str] = wording.short,
) -> str:
    """One point a series, x on a log scale, named beside the point; the base as a dashed line. With `higher` a line goes
    through the points that no other one beats in both (Pareto): further left, and higher up (or lower down)."""
    series = [s for s in series if s.points and s.points[0][0] > 0]
    if not series:
        return ""
    points = [s.points[0] for s in series]
    x = axis_around([p[0] for p in points], LEFT, WIDTH - 20, log=True)
    y = axis_around([p[1] for p in points] + ([reference[1]] if reference else []), HEIGHT - BOTTOM, TOP + 8, pad=0.12)
    body = [frame(x, y, x_title, y_title, x_show, y_show)]
    if reference:
        body.append(reference_line(*reference, x, y))
    if higher is not None:
        line = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in frontier(points, higher))
        body.append(f'<polyline class="frontier" points="{line}"/>')
    taken = [Box(x(a) - 7, y(b) - 7, 14, 14) for a, b in points]
    names = []
    for s, (a, b) in zip(series, points, strict=True):
        text = fit(s.label, 24)
        box = free_place(x(a), y(b), 7.1 * min(len(s.label), 24), taken, x)
        taken.append(box)
        body.append(marker(s.colour, x(a), y(b), s.hint or s.label, 6))
        names.append(f'<text class="name t{s.colour % 8}" x="{box.x:.1f}" y="{box.y + 12:.1f}">{text}</text>')
    return svg("".join(body + names), title)


def frontier(points: Sequence[tuple[float, float]], higher: bool) -> list[tuple[float, float]]:
    """The points that none with a smaller (or the same) x beats in y, by x."""
    found: list[tuple[float, float]] = []
    for a, b in sorted(points, key=lambda p: (p[0], -p[1] if higher else p[1])):
        if not found or (b > found[-1][1] if higher else b < found[-1][1]):
            found.append((a, b))
    return found


@dataclass(frozen=True)
class Box:
    """A rectangle, by its upper left corner."""

    x: float
    y: float
    width: float
    height: float

    def overlap(self, other: Box) -> float:
        """Common area."""
        wide = min(self.x + self.width, other.x + other.width) - max(self.x, other.x)
        high = min(self.y + self.height, other.y + other.height) - max(self.y, other.y)
        return max(wide, 0) * max(high, 0)


def free_place(x: float, y: float, width: float, taken: Sequence[Box], axis: Axis) -> Box:
    """Where a name of this width beside a point covers least: right, left, above, below, or at a corner."""
    high = LINE
    corners = [
        (x + 11, y - 8), (x - 11 - width, y - 8), (x - width / 2, y - 25), (x - width / 2, y + 9),
        (x + 8, y - 22), (x + 8, y + 7), (x - 8 - width, y - 22), (x - 8 - width, y + 7),
    ]  # fmt: skip
    boxes = [Box(a, b, width, high) for a, b in corners]

    def cost(box: Box) -> float:
        outside = max(axis.start - box.x, 0) + max(box.x + box.width - WIDTH, 0) + max(TOP - box.y, 0)
        return sum(box.overlap(t) for t in taken) + 100 * outside

    return min(boxes, key=cost)


def dumbbells(rows: Sequence[tuple[str, int, float, float]], title: str, show: Callable[[float], str]) -> str:
    """Before and after, a row each: (label, colour, before, after)."""
    if not rows:
        return ""
    pitch = min(max((HEIGHT - 60) / len(rows), 34), 52)
    height = round(40 + pitch * len(rows))
    name = min(190, 20 + 7.2 * max(min(len(r[0]), 24) for r in rows))
    values = [v for r in rows for v in r[2:]]
    x = axis_around(values, name + 10, WIDTH - 70)
    body = []
    for tick in x.ticks():
        at = x(tick)
        body.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="8" y2="{height - 26}"/>')
        body.append(f'<text class="tick" x="{at:.1f}" y="{height - 10}" text-anchor="middle">{escape(show(tick))}</text>')
    for i, (label, colour, before, after) in enumerate(rows):
        at = round(8 + pitch * (i + 0.5))
        right = x(max(before, after))
        body.append(f'<text class="name t{colour % 8}" x="{name}" y="{at + 4}" text-anchor="end">{fit(label, 24)}</text>')
        body.append(f'<line class="bell s{colour % 8}" x1="{x(before):.1f}" x2="{x(after):.1f}" y1="{at}" y2="{at}"/>')
        body.append(
            f'<circle class="before" cx="{x(before):.1f}" cy="{at}" r="5"><title>before: {show(before)}</title></circle>'
        )
        body.append(marker(colour, x(after), at, f"{label}: {show(before)} before, {show(after)} after", 6))
        body.append(f'<text class="value" x="{right + 12:.1f}" y="{at + 4}">{escape(show(after))}</text>')
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(body)}</svg>"
    )


def fit(label: str, longest: int = 17) -> str:
    """A label cut to the room there is, escaped."""
    return escape(label if len(label) <= longest else label[: longest - 1] + "…")
