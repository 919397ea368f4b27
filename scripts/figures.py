"""Draw the figures of the documentation: docs/figures/*.svg.

    python scripts/figures.py [name …] [--out FOLDER] [--png]

Every figure has the same left half, one transformer block with the places where adapters enter, and a detail with
tensor shapes on the right. Frozen parts are grey, trained ones orange. The output is the same from run to run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Polygon, Rectangle

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "figures"
FROZEN, FROZEN_EDGE = "#e6eaf0", "#7d8a9c"
TRAINED, TRAINED_EDGE = "#ffdcb0", "#cc6f14"
DATA, DATA_EDGE = "#ffffff", "#4a4a4a"
PAD = "#f4f4f4"
INK, FAINT = "#222222", "#6b7683"
WIDTH, HEIGHT = 110, 62

matplotlib.rcParams.update({"svg.hashsalt": "graftlm", "svg.fonttype": "path", "font.family": "DejaVu Sans", "font.size": 9})


class Sheet:
    """One figure: axes of 110 x 62 units without frame, and the few shapes that the figures are made of."""

    def __init__(self, title: str) -> None:
        self.figure = Figure(figsize=(9.2, 5.2))
        FigureCanvasAgg(self.figure)
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_xlim(0, WIDTH)
        self.axes.set_ylim(0, HEIGHT)
        self.axes.set_aspect("equal")
        self.axes.axis("off")
        self.axes.add_patch(Rectangle((0, 0), WIDTH, HEIGHT, facecolor="white", edgecolor="none", zorder=-10))
        self.text(3, 59.6, title, size=12, weight="bold", align="left")

    def text(self, x: float, y: float, text: str, size: float = 9, align: str = "center", **options: Any) -> None:
        self.axes.text(
            x, y, text, ha=align, va="center", fontsize=size, color=options.pop("color", INK), linespacing=1.45, **options
        )

    def box(self, x: float, y: float, w: float, h: float, text: str = "", kind: str = "frozen", size: float = 9) -> None:
        """A rounded box by its centre."""
        face, edge = colours(kind)
        style = "round,pad=0,rounding_size=0.9"
        corner = (x - w / 2, y - h / 2)
        self.axes.add_patch(FancyBboxPatch(corner, w, h, boxstyle=style, facecolor=face, edgecolor=edge, linewidth=1.1))
        self.text(x, y, text, size=size)

    def wedge(self, x: float, y: float, w_low: float, w_high: float, h: float, text: str, size: float = 9) -> None:
        """A trained matrix that narrows or widens upwards, by its centre."""
        low, high = y - h / 2, y + h / 2
        corners = [(x - w_low / 2, low), (x + w_low / 2, low), (x + w_high / 2, high), (x - w_high / 2, high)]
        self.axes.add_patch(Polygon(corners, closed=True, facecolor=TRAINED, edgecolor=TRAINED_EDGE, linewidth=1.1))
        self.text(x, y, text, size=size)

    def line(self, *points: tuple[float, float], color: str = DATA_EDGE, **options: Any) -> None:
        xs, ys = zip(*points, strict=True)
        self.axes.plot(xs, ys, color=color, linewidth=options.pop("width", 1.1), solid_capstyle="butt", **options)

    def arrow(self, *points: tuple[float, float], color: str = DATA_EDGE, **options: Any) -> None:
        """A line through the points with a head at the last."""
        if len(points) > 2:
            self.line(*points[:-1], color=color, **dict(options))
        style = {"arrowstyle": "-|>", "color": color, "linewidth": options.get("width", 1.1), "shrinkA": 0, "shrinkB": 0}
        if "linestyle" in options:
            style["linestyle"] = options["linestyle"]
        self.axes.annotate("", xy=points[-1], xytext=points[-2], arrowprops={**style, "mutation_scale": 9})

    def plus(self, x: float, y: float, kind: str = "data") -> None:
        face, edge = colours(kind)
        self.axes.add_patch(Circle((x, y), 1.35, facecolor=face, edgecolor=edge, linewidth=1.1, zorder=3))
        self.text(x, y, "+", size=10, zorder=4)

    def mark(self, x: float, y: float, text: str = "") -> None:
        """A small orange disc: here the adapter enters."""
        self.axes.add_patch(Circle((x, y), 1.5, facecolor=TRAINED_EDGE, edgecolor="white", linewidth=0.8, zorder=5))
        self.text(x, y, text, size=7.5, color="white", weight="bold", zorder=6)

    def cells(self, x: float, y: float, labels: Sequence[str], w: float = 5, h: float = 4.2, size: float = 9) -> None:
        """A row of cells from the left edge x; labels starting with v are trained, `pad` is padding."""
        for i, label in enumerate(labels):
            kind = "trained" if label.startswith(("v", "$v", "$k", "$P")) else "data"
            face, edge = colours(kind)
            face = PAD if label == "pad" else face
            self.axes.add_patch(Rectangle((x + i * w, y - h / 2), w, h, facecolor=face, edgecolor=edge, linewidth=1))
            self.text(x + (i + 0.5) * w, y, label, size=size, color=FAINT if label == "pad" else INK)

    def panel(self, x: float, y: float, w: float, h: float) -> None:
        """The frame of a detail, by its lower left corner."""
        self.axes.add_patch(
            FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=1.2", facecolor="#fcfcfd", edgecolor="#c9d0d9",
                           linewidth=1, zorder=-5)
        )  # fmt: skip

    def legend(self, x: float = 45, y: float = 2.6) -> None:
        for i, (kind, text) in enumerate((("frozen", "frozen"), ("trained", "trained"), ("data", "activations"))):
            face, edge = colours(kind)
            at = x + 16 * i
            self.axes.add_patch(Rectangle((at, y - 1), 2.6, 2, facecolor=face, edgecolor=edge, linewidth=1))
            self.text(at + 3.6, y, text, size=8, align="left", color=FAINT)


def colours(kind: str) -> tuple[str, str]:
    return {"frozen": (FROZEN, FROZEN_EDGE), "trained": (TRAINED, TRAINED_EDGE), "data": (DATA, DATA_EDGE)}[kind]


X = 19.0  # the middle of the block on the left


def block(sheet: Sheet) -> None:
    """The transformer block that all figures share: embeddings, attention half, feed-forward half, head."""
    s = sheet
    s.axes.add_patch(
        FancyBboxPatch((4, 10.5), 30, 39.5, boxstyle="round,pad=0,rounding_size=1.2", facecolor="none", edgecolor="#aab4c0",
                       linewidth=1, linestyle=(0, (4, 3)))
    )  # fmt: skip
    s.text(33, 12.2, "block, L times", size=7.5, align="right", color=FAINT)
    s.box(X, 5.6, 24, 4.4, "input embeddings")
    s.box(X, 16, 18, 3.4, "norm", size=8)
    s.box(X, 23, 22, 6, "self-attention\nq, k, v  →  out", size=8.5)
    s.box(X, 35, 18, 3.4, "norm", size=8)
    s.box(X, 42, 22, 6, "feed-forward\nin  →  act  →  out", size=8.5)
    s.box(X, 54.6, 24, 4, "output head")
    for low, high in ((7.8, 14.3), (17.7, 20), (26, 28.35), (30.95, 33.3), (36.7, 39), (45, 46.85), (49.55, 52.6)):
        s.arrow((X, low), (X, high))
    s.plus(X, 29.7)
    s.plus(X, 48.2)
    for low, high in ((12.2, 29.7), (32, 48.2)):
        s.arrow((X, low), (6.2, low), (6.2, high), (X - 1.35, high))
    s.text(21, 9.2, "[B, T, H]", size=7.5, align="left", color=FAINT)


def callout(sheet: Sheet, x: float, y: float, to: tuple[float, float]) -> None:
    """From a mark in the block to the detail."""
    sheet.mark(x, y)
    sheet.line((x + 1.5, y), to, color=TRAINED_EDGE, linestyle=(0, (2, 2)), width=1)


def entry_points() -> Sheet:
    s = Sheet("Where adapters enter a frozen transformer")
    block(s)
    rows = (
        ("1", 11, "input embeddings", "virtual tokens [P, H] beside the real ones", "Prompt Tuning, P-Tuning"),
        ("2", 23, "attention memory", "keys and values [kv_heads, P, head_dim] in every layer", "Prefix Tuning"),
        ("3", 35, "a linear layer's output", "a low-rank update  scale · B(A(x))", "LoRA"),
        ("4", 47, "a block's output", "a residual bottleneck  up(act(down(h)))", "bottleneck adapters"),
    )
    for x, y, number in ((12, 5.6, "1"), (-11, 23, "2"), (11, 21.4, "3"), (11, 24.6, "4"), (11, 40.4, "3"), (11, 43.6, "4")):
        s.mark(X + x, y, number)
    for number, y, place, what, methods in rows:
        s.panel(45, y - 4.6, 62, 9.6)
        s.mark(48.6, y + 0.2, number)
        s.text(52, y + 2.4, place, size=9.5, weight="bold", align="left")
        s.text(52, y - 0.3, what, size=8.5, align="left")
        s.text(52, y - 2.8, methods, size=8.5, align="left", color=TRAINED_EDGE)
    s.legend()
    return s


def lora() -> Sheet:
    s = Sheet("LoRA")
    block(s)
    callout(s, X + 11, 23, (45, 30))
    s.mark(X + 11, 42)
    s.line((X + 12.5, 42), (45, 34), color=TRAINED_EDGE, linestyle=(0, (2, 2)), width=1)
    s.panel(45, 6, 62, 50)
    s.text(76, 9.6, "x   [B, T, in]")
    s.arrow((76, 11.4), (76, 15), (60, 15), (60, 20))
    s.arrow((76, 15), (92, 15), (92, 17.4))
    s.box(92, 19.2, 15, 3.6, "dropout", "data", 8)
    s.arrow((92, 21), (92, 23.2))
    s.box(60, 28, 22, 16, "W\n[out, in]")
    s.wedge(92, 26.4, 20, 7, 6.4, "A   [r, in]")
    s.arrow((92, 29.6), (92, 32.6))
    s.text(93.2, 31.1, "[B, T, r]", size=7.5, align="left", color=FAINT)
    s.wedge(92, 35.8, 7, 20, 6.4, "B   [out, r]")
    s.arrow((92, 39), (92, 41.2))
    s.box(92, 43, 15, 3.6, "× alpha / r", "data", 8)
    s.arrow((60, 36), (60, 49), (74.65, 49))
    s.arrow((92, 44.8), (92, 49), (77.35, 49))
    s.plus(76, 49)
    s.arrow((76, 50.35), (76, 52.3))
    s.text(76, 53.8, "y   [B, T, out]")
    s.legend()
    return s


def prompt_tuning() -> Sheet:
    s = Sheet("Prompt Tuning")
    block(s)
    callout(s, X + 12, 5.6, (45, 30))
    s.panel(45, 6, 62, 50)
    s.box(76, 51.5, 30, 4.6, "table  E   [P, H]", "trained")
    s.text(48, 44.6, "left padding, P = 2", size=8.5, weight="bold", align="left")
    real, virtual, padding = ("$x_0$", "$x_1$", "$x_2$"), ("$v_0$", "$v_1$"), ("pad", "pad")
    padded_rows(s, 39.6, padding + real, padding + virtual + real, "0 0 1 1 1 1 1", "· · 0 1 2 3 4")
    s.text(48, 25.6, "right padding", size=8.5, weight="bold", align="left")
    padded_rows(s, 20.6, real + padding, virtual + real + padding, "1 1 1 1 1 0 0", "0 1 2 3 4 · ·")
    s.legend()
    return s


def padded_rows(s: Sheet, y: float, given: Sequence[str], placed: Sequence[str], mask: str, positions: str) -> None:
    """A row as given and with virtual tokens, with its mask and positions below."""
    left, w = 66, 5.2
    s.text(48, y, "given  [T, H]", size=8, align="left", color=FAINT)
    s.cells(left, y, given, w, 3.6, 8.5)
    s.text(48, y - 5, "enters  [P + T, H]", size=8, align="left", color=FAINT)
    s.cells(left, y - 5, placed, w, 3.6, 8.5)
    for row, (name, values) in enumerate((("attention mask", mask), ("positions", positions))):
        at = y - 8.2 - 2.3 * row
        s.text(48, at, name, size=8, align="left", color=FAINT)
        for i, value in enumerate(values.split()):
            s.text(left + (i + 0.5) * w, at, value, size=8)


def p_tuning() -> Sheet:
    s = Sheet("P-Tuning")
    block(s)
    callout(s, X + 12, 5.6, (45, 14))
    s.panel(45, 6, 62, 50)
    s.text(59, 53.6, "MLP (default)", size=8.5, weight="bold")
    s.text(92, 53.6, "LSTM", size=8.5, weight="bold")
    for x in (59, 92):
        s.box(x, 49.4, 22, 4.2, "table  E   [P, H]", "trained", 8.5)
        s.arrow((x, 47.3), (x, 45.3))
    mlp = (("Linear   H → h", 43.5), ("ReLU", 39.4), ("Linear   h → h", 35.3), ("ReLU", 31.2), ("Linear   h → H", 27.1))
    for text, y in mlp:
        s.box(59, y, 22, 3.2, text, "data" if text == "ReLU" else "trained", 8)
    s.box(92, 42, 24, 6.2, "biLSTM, 2 layers   H → 2h", "trained", 8)
    for text, y in (("Linear   2h → 2h", 35.3), ("ReLU", 31.2), ("Linear   2h → H", 27.1)):
        s.box(92, y, 24, 3.2, text, "data" if text == "ReLU" else "trained", 8)
    for low, high in ((41.9, 41), (37.8, 36.9), (33.7, 32.8), (29.6, 28.7)):
        s.arrow((59, low), (59, high))
    for low, high in ((38.9, 36.9), (33.7, 32.8), (29.6, 28.7)):
        s.arrow((92, low), (92, high))
    s.arrow((59, 25.5), (59, 20.7), (70, 20.7))
    s.arrow((92, 25.5), (92, 20.7), (82, 20.7))
    s.box(76, 20.7, 12, 4.2, "v   [P, H]", "trained", 8.5)
    s.arrow((76, 18.6), (76, 15.6))
    s.cells(56, 13.4, ("$v_0$", "$v_1$", "$x_0$", "$x_1$", "$x_2$", "$x_3$", "…"), 5.6, 4)
    s.text(76, 9, "beside the real tokens, as in Prompt Tuning", size=8, color=FAINT)
    s.text(88.4, 18.2, "only v is kept for use", size=7.5, align="left", color=FAINT)
    s.legend()
    return s


def prefix_tuning() -> Sheet:
    s = Sheet("Prefix Tuning")
    block(s)
    callout(s, X + 11, 23, (45, 30))
    s.panel(45, 6, 62, 50)
    s.box(76, 51.6, 50, 4.4, "table   [P,  sum over layers of 2 · kv_heads · head_dim]", "trained", 8.5)
    s.text(76, 47.8, "(or  $W_2$ tanh($W_1 e$)  of a table [P, token_dim]: prefix_projection)", size=7.5, color=FAINT)
    s.arrow((62, 46), (62, 43.6))
    s.arrow((90, 46), (90, 43.6))
    s.text(62, 42, "layer j:  $K_P$, $V_P$   [kv_heads, P, head_dim]", size=8)
    s.text(93, 42, "… and every other layer", size=8, color=FAINT)
    s.arrow((62, 40.6), (62, 38.3))
    left, w, h = 62, 5, 3.4
    s.cells(left - 5, 36.4, ("$k_0$", "$k_1$"), w, h, 8.5)
    s.cells(left + 5, 36.4, ("$x_0$", "$x_1$", "$x_2$", "$x_3$"), w, h, 8.5)
    s.text(48, 36.4, "keys", size=8, align="left", color=FAINT)
    s.text(48, 26.9, "queries", size=8, align="left", color=FAINT)
    for row in range(4):
        y = 32 - row * h
        s.text(left - 7, y, f"$x_{row}$", size=8.5)
        for column in range(6):
            seen = column < 2 or column - 2 <= row
            face = TRAINED if column < 2 else ("#cfd8e3" if seen else DATA)
            corner = (left - 5 + column * w, y - h / 2)
            s.axes.add_patch(Rectangle(corner, w, h, facecolor=face, edgecolor="#9aa5b1", linewidth=0.8))
    s.text(90, 32, "[T, P + T] attention", size=8, align="left", color=FAINT)
    s.text(90, 28.6, "every query sees\nthe whole prefix", size=8, align="left", color=FAINT)
    s.text(72, 16.4, "positions of real tokens start at P;\nprefix keys are not rotated under RoPE", size=8, color=FAINT)
    s.text(72, 10.6, "padding stands between the prefix and the real tokens, masked out", size=8, color=FAINT)
    s.legend()
    return s


def bottleneck() -> Sheet:
    s = Sheet("Bottleneck adapters")
    block(s)
    s.mark(X + 11, 23)
    callout(s, X + 11, 42, (45, 44))
    s.panel(45, 6, 62, 50)
    s.text(57, 53.4, "the adapter", size=8.5, weight="bold")
    s.text(57, 10.4, "h   [B, T, H]", size=8.5)
    s.arrow((57, 12), (57, 17.8))
    s.wedge(57, 21, 19, 8, 6.4, "down\n[d, H]", 8)
    s.arrow((57, 24.2), (57, 26.8))
    s.box(57, 28.6, 10, 3.6, "act", "data", 8)
    s.text(63, 28.6, "[B, T, d]", size=7.5, align="left", color=FAINT)
    s.arrow((57, 30.4), (57, 33))
    s.wedge(57, 36.2, 8, 19, 6.4, "up\n[H, d]", 8)
    s.arrow((57, 39.4), (57, 44.65))
    s.text(58, 42, "× scaling", size=7.5, align="left", color=FAINT)
    s.plus(57, 46)
    s.arrow((57, 14.6), (46.6, 14.6), (46.6, 46), (55.65, 46))
    s.arrow((57, 47.35), (57, 50.6))
    s.line((72, 8), (72, 54), color="#d5dbe3")
    placements = (78, "HOULSBY", (True, True)), (88.2, "PFEIFFER", (False, True)), (98.4, "PARALLEL", (False, None))
    for x, name, halves in placements:
        s.text(x, 53.4, name, size=8, weight="bold")
        s.arrow((x - 1, 9), (x - 1, 12.8))
        s.box(x - 1, 15, 7, 4.4, "attn", size=8)
        s.box(x - 1, 33, 7, 4.4, "ffn", size=8)
        half(s, x - 1, 17.2, 30.8, halves[0], 24)
        half(s, x - 1, 35.2, 50.4, halves[1], 42)
        if halves[1] is None:
            s.box(x + 5.2, 33, 3.4, 4.4, "", "trained")
            s.arrow((x - 1, 28.6), (x + 5.2, 28.6), (x + 5.2, 30.8))
            s.arrow((x + 5.2, 35.2), (x + 5.2, 46), (x + 0.35, 46))
        for y in (27.4 if halves[1] is not None else 26.2, 46):
            s.plus(x - 1, y)
    s.text(89, 7.4, "place in a block (the block's own residual adds at +)", size=7, color=FAINT)
    s.legend()
    return s


def half(s: Sheet, x: float, low: float, high: float, adapter: bool | None, y: float) -> None:
    """From a half's output to the next, through an adapter where there is one."""
    if adapter:
        s.arrow((x, low), (x, y - 1.7))
        s.box(x, y, 5.4, 3.4, "", "trained")
        s.arrow((x, y + 1.7), (x, high))
    else:
        s.arrow((x, low), (x, high))


FIGURES: dict[str, Callable[[], Sheet]] = {
    "entry-points": entry_points, "lora": lora, "prompt-tuning": prompt_tuning, "p-tuning": p_tuning,
    "prefix-tuning": prefix_tuning, "bottleneck": bottleneck,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"figures to draw: {', '.join(FIGURES)} (all by default)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to")
    parser.add_argument("--png", action="store_true", help="PNG instead of SVG, for a quick look")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.names or FIGURES:
        sheet = FIGURES[name]()
        if options.png:
            sheet.figure.savefig(options.out / f"{name}.png", dpi=110)
        else:
            sheet.figure.savefig(options.out / f"{name}.svg", format="svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
