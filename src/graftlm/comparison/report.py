"""The comparison as one HTML file: everything inline, nothing loaded from elsewhere, no script."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from . import charts, wording
from .charts import Series
from .findings import FAILED, Findings, Row
from .style import sheet

SAMPLES = 4  # examples with generations


def page(result: Findings) -> str:
    """The whole document."""
    parts = (header, tiles, advice, pictures, table, rates, samples, recipes)
    sections = [part(result) for part in parts]
    title = f"{result.data} on {short_name(result.base)}"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)} – GraftLM comparison</title><style>\n{sheet()}</style></head>\n<body><main>\n"
        + "\n".join(s for s in sections if s)
        + f"\n{footer(result)}\n</main></body></html>\n"
    )


def short_name(base: str) -> str:
    """The last part of a path; a hub id as it is."""
    return base.rstrip("/").rpartition("/")[2] if base.startswith(("/", ".", "~")) else base


def colours(result: Findings) -> dict[str, int]:
    return {row.label: i for i, row in enumerate(result.rows)}


def header(result: Findings) -> str:
    base, data = escape(short_name(result.base)), escape(result.data)
    return (
        f'<header><div class="brand">GraftLM · method comparison</div>'
        f"<h1>{len(result.rows)} ways to teach {base} “{data}”</h1>"
        f'<p class="lead">{escape(wording.verdict(result))}</p></header>'
    )


def tiles(result: Findings) -> str:
    """The key figures."""
    best, key = result.best, result.quality
    show = wording.percent if key == "accuracy" else wording.number
    found: list[tuple[str, str]] = []
    if best is not None:
        before = show(result.before(best, key)).removesuffix(" %")
        found.append((f"{before} → {show(best.mean(key))}", f"held-out {key}, base → {best.label}"))
        smallest = min((r.mean("file_bytes") or 0, r.label) for r in result.rows if r.done)
        found.append((wording.size(smallest[0]), f"smallest adapter ({smallest[1]})"))
    found.append((wording.count(result.base_parameters), "parameters in the frozen base"))
    rows = " + ".join(f"{n:,}" for n in (result.train_rows, result.eval_rows) if n)
    if rows:
        found.append((rows, "rows to train on + held out"))
    found.append((wording.duration(result.seconds), machine(result)))
    body = "".join(f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in found)
    return f'<section class="tiles">{body}</section>'


def advice(result: Findings) -> str:
    """What to take, and why."""
    lines = wording.recommendation(result)
    body = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return f'<h2>What to take</h2><div class="card advice">{body}</div>' if lines else ""


def rates(result: Findings) -> str:
    """The search of learning rates."""
    if not result.search:
        return ""
    body = ""
    for label, trials in result.search.items():
        cells = "".join(
            f"<td{' class=right' if t['status'] == 'chosen' else ''}>{t['learning_rate']:g}"
            f"<small>{wording.number(t['loss'])}, {escape(t['status'])}, {t['steps']:,} steps</small></td>"
            for t in trials
        )
        body += f"<tr><td>{escape(label)}</td>{cells}</tr>"
    note = "Loss on tuning rows, a part of the rows to train on; the worse half stopped twice. Held-out rows chose nothing."
    return (
        f'<h2>How the learning rates were found</h2><div class="card scroll"><table><tbody>{body}</tbody></table></div>'
        f'<p class="note">{note}</p>'
    )


def machine(result: Findings) -> str:
    device = result.machine.get("device", "")
    return f"for all of it, on {device}" if device else "for all of it"


def pictures(result: Findings) -> str:
    """The charts, two in a row."""
    cards = [gains(result), *(against(result, *cost) for cost in COSTS), forgotten(result), *curves(result)]
    body = "".join(
        f'<div class="card"><h3>{escape(t)}</h3><p class="note">{escape(n)}</p>{s}</div>' for t, n, s in cards if s
    )
    return f'<h2>At a glance</h2><section class="charts">{body}</section>' if body else ""


def gains(result: Findings) -> tuple[str, str, str]:
    key = result.quality
    show = wording.percent if key == "accuracy" else wording.number
    order = sorted(
        (r for r in result.rows if r.mean(key) is not None), key=lambda r: r.mean(key) or 0, reverse=key == "accuracy"
    )
    rows = [(r.label, colours(result)[r.label], result.before(r, key), r.mean(key)) for r in order]
    rows = [r for r in rows if r[2] is not None]
    picture = charts.dumbbells(rows, f"Held-out {key} before and after", show)  # type: ignore[arg-type]
    better = "higher" if key == "accuracy" else "lower"
    return (
        f"Held-out {key}, before → after",
        f"Hollow: the plain base, in the row's form. Filled: with the adapter; {better} is better.",
        picture,
    )


# What quality is shown against: title, metric, axis, how a value reads.
COSTS: tuple[tuple[str, str, str, Any], ...] = (
    ("parameters", "trainable_parameters", "trained parameters (log scale)", wording.count),
    ("file", "file_bytes", "size of the adapter's file (log scale)", wording.size),
    ("time", "seconds", "seconds of training (log scale)", wording.duration),
    ("memory", "peak_memory_bytes", "peak memory (log scale)", wording.size),
)


def against(result: Findings, name: str, metric: str, axis: str, read: Any) -> tuple[str, str, str]:
    """Quality against one cost, with the line of what nothing else beats (Pareto)."""
    key = result.quality
    show = wording.percent if key == "accuracy" else wording.number
    tick = (lambda v: wording.percent(v, 0)) if key == "accuracy" else (lambda v: f"{v:g}")
    series = []
    for row in result.rows:
        cost, value = row.mean(metric), row.mean(key)
        if cost is not None and value is not None:
            hint = f"{row.label}: {show(value)}, {read(cost)}"
            series.append(Series(row.label, colours(result)[row.label], [(cost, value)], hint))
    before = result.base_metrics.get(key)
    heights = [s.points[0][1] for s in series] or [0.0]
    far = before is not None and min(abs(h - before) for h in heights) > 1.5 * (max(heights) - min(heights))
    reference = None if before is None or far else (f"base {show(before)}", before)
    picture = charts.scatter_chart(
        series, f"{key} against {name}", axis, f"held-out {key}", tick, reference, key == "accuracy",
        wording.short if metric == "trainable_parameters" else read,
    )  # fmt: skip
    note = f" The plain base, at {show(before)}, is outside of the picture." if far else ""
    return f"Quality for its {name}", f"On the line: nothing else is better and cheaper.{note}", picture


def forgotten(result: Findings) -> tuple[str, str, str]:
    """Loss on general text before and after."""
    rows = [(r.label, colours(result)[r.label], r.mean("general_loss_before"), r.mean("general_loss")) for r in result.rows]
    found = sorted((r for r in rows if r[2] is not None and r[3] is not None), key=lambda r: r[3] or 0)
    note = f"Loss on general text ({result.general}) that no method was trained on: further right, more is forgotten."
    return "Forgetting", note, charts.dumbbells(found, "Loss on general text", wording.number)  # type: ignore[arg-type]


def curves(result: Findings) -> list[tuple[str, str, str]]:
    """Held-out and training loss over steps: the first finished seed of each method."""
    held_out, training = [], []
    for row in result.rows:
        run = next((r for r in row.runs if r.history), None)
        if run is None:
            continue
        colour = colours(result)[row.label]
        base, evaluated = result.before(row, "loss"), points(run.history, "eval_loss")
        start = [(0.0, base)] if base is not None else []
        held_out.append(Series(row.label, colour, start + evaluated if evaluated else []))
        training.append(Series(row.label, colour, points(run.history, "epoch_train_loss") or points(run.history, "loss")))
    found = []
    for title, note, series in (
        ("Held-out loss while training", "Nats a labelled token, after each epoch; starts at the plain base.", held_out),
        ("Training loss", "Nats a labelled token, mean of each epoch.", training),
    ):
        found.append((title, note, charts.line_chart(series, title, "step", "loss")))
    return found


def points(history: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of one key of the log; values that are no numbers are left out. The last one of a step counts."""
    found = {
        float(e.get("step", 0)): float(e[key]) for e in history if isinstance(e.get(key), (int, float)) and e[key] == e[key]
    }
    return sorted(found.items())


def table(result: Findings) -> str:
    """All measures, a row each method, best first."""
    has = result.quality == "accuracy"
    titles = ["Method", *(["Accuracy"] if has else []), "Loss", "Perplexity", "Trained", "File", "Time",
              "Tokens/s", "Peak memory", *(["General text"] if result.general else []), "Base in memory"]  # fmt: skip
    head = "".join(f"<th>{t}</th>" for t in titles)
    body = [base_row(result, title, measured, has) for title, measured in result.bases.items()]
    body += [table_row(result, row, has, len(titles)) for row in ordered(result)]
    seeds = max((len(r.runs) for r in result.rows), default=1)
    note = f"Mean ± standard deviation over {seeds} seeds. " if seeds > 1 else ""
    note += "All measures of quality are on held-out rows that no method was trained on."
    return (
        f'<h2>All figures</h2><div class="card scroll"><table><thead><tr>{head}</tr></thead>'
        f'<tbody>{"".join(body)}</tbody></table></div><p class="note">{note}</p>'
    )


def base_row(result: Findings, title: str, base: Mapping[str, Any], has_accuracy: bool) -> str:
    """The plain base, in one form."""
    own = [r for r in result.rows if r.quantization == base.get("quantization")]
    general = next((v for r in own if (v := r.mean("general_loss_before")) is not None), None)
    cells = [
        f"plain {title}",
        *([wording.percent(base.get("accuracy"))] if has_accuracy else []),
        wording.number(base.get("loss")),
        wording.perplexity(base.get("perplexity")),
        "0",
        *[wording.DASH] * 4,
        *([wording.number(general)] if result.general else []),
        wording.size(base.get("base_bytes")),
    ]
    return '<tr class="base">' + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>"


def ordered(result: Findings) -> list[Row]:
    """Best first; what failed, last."""
    sign = -1 if result.quality == "accuracy" else 1
    return sorted(result.rows, key=lambda r: (not r.done, sign * (r.mean(result.quality) or 0)))


def table_row(result: Findings, row: Row, has_accuracy: bool, width: int) -> str:
    name = f'<span class="dot d{colours(result)[row.label] % 8}"></span>{escape(row.label)}'
    if not row.done:
        run = next((r for r in row.runs if r.status == FAILED), row.runs[0])
        text = escape(f"{run.status}: {run.error}" if run.error else run.status)
        return f'<tr class="failed"><td>{name}</td><td class="left" colspan="{width - 1}">{text}</td></tr>'
    best = result.best is not None and result.best.label == row.label
    name += '<span class="badge">best</span>' if best else ""
    failed = [r for r in row.runs if r.status == FAILED]
    name += f'<small class="loss">{len(failed)} of {len(row.runs)} seeds failed</small>' if failed else ""
    parameters = row.mean("trainable_parameters")
    cells = [
        name,
        *([with_change(result, row, "accuracy", wording.percent, True)] if has_accuracy else []),
        with_change(result, row, "loss", wording.number, False),
        wording.perplexity(row.mean("perplexity")),
        f"{wording.count(parameters)}<small>{wording.share(parameters, result.base_parameters)} of the base</small>",
        wording.size(row.mean("file_bytes")),
        wording.duration(row.mean("seconds")),
        wording.count(row.mean("tokens_per_second")),
        wording.size(row.mean("peak_memory_bytes")),
        *([with_change(result, row, "general_loss", wording.number, False)] if result.general else []),
        wording.size(row.mean("base_bytes")) + (f"<small>{escape(row.quantization)}</small>" if row.quantization else ""),
    ]
    return f"<tr{' class=best' if best else ''}>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>"


def with_change(result: Findings, row: Row, key: str, show: Any, higher_is_better: bool) -> str:
    """A value, its spread, and the change from the base in green or red."""
    after, before = row.mean(key), result.before(row, key)
    text = escape(wording.spread(row, key, show))
    if after is None or before is None or after == before:
        return text
    good = (after > before) is higher_is_better
    change = show(abs(after - before)).replace(" %", " points")
    return f'{text}<small class="{"gain" if good else "loss"}">{"+" if after > before else "−"}{escape(change)}</small>'


def samples(result: Findings) -> str:
    """Held-out prompts with the base's answer and each method's."""
    runs = {row.label: row.done[0].samples for row in result.rows if row.done and row.done[0].samples}
    if not runs:
        return ""
    first = next(iter(runs.values()))
    form = next(row.quantization for row in result.rows if row.label in runs)
    base_name = f"plain base in {form}" if form else "plain base"
    is_label = result.quality == "accuracy"
    cards = []
    for i, sample in enumerate(first[:SAMPLES]):
        target = str(sample.get("target", ""))
        lines = [answer(base_name, "", str(sample.get("before", "")), target, is_label)]
        for label, found in runs.items():
            mine = next((s for s in found if s.get("prompt") == sample.get("prompt")), found[i] if i < len(found) else None)
            if mine is not None:
                dot = f'<span class="dot d{colours(result)[label] % 8}"></span>'
                lines.append(answer(label, dot, str(mine.get("after", "")), target, is_label))
        cards.append(
            f'<div class="card sample"><div class="prompt">{escape(str(sample.get("prompt", "")))}</div>'
            f"<table><tbody>{''.join(lines)}"
            f"<tr><td>reference</td><td>{escape(target)}</td></tr></tbody></table></div>"
        )
    return f"<h2>Before and after, on held-out examples</h2>{''.join(cards)}"


def answer(label: str, dot: str, text: str, target: str, is_label: bool) -> str:
    """A generated answer; for label tasks coloured by whether it is right."""
    mark = (' class="right"' if text.strip() == target.strip() else ' class="wrong"') if is_label else ""
    shown = escape(text.strip()) or "<span class=muted>(nothing)</span>"
    return f"<tr><td>{dot}{escape(label)}</td><td{mark}>{shown}</td></tr>"


def recipes(result: Findings) -> str:
    """The exact recipe of every run."""
    parts = [
        f"<details><summary>{escape(run.label)}{f', seed {run.seed}' if len(row.runs) > 1 else ''}"
        f'</summary><pre><code>{escape(run.recipe)}</code></pre></details>'
        for row in result.rows for run in row.runs if run.recipe
    ]  # fmt: skip
    if not parts:
        return ""
    command = f"<p>All of it again: <code>{escape(result.command)}</code></p>" if result.command else ""
    again = "One row again: save its recipe as <code>recipe.yaml</code> and run <code>graftlm train recipe.yaml</code>."
    intro = f"{command}<p class=note>{again}</p>"
    return f"<h2>To repeat it</h2>{intro}{''.join(parts)}"


def footer(result: Findings) -> str:
    found = ", ".join(f"{k} {v}" for k, v in result.machine.items() if k != "device")
    return (
        f"<footer>Base: {escape(result.base)} · data: {escape(result.data)} · {escape(found)}<br>"
        "All methods trained together over one base: time is a method's own part of it, peak memory that of the whole "
        "process (or of the GPU) in the one step that it made alone; base in memory, its weights. "
        "The same figures are in comparison.json beside this page.</footer>"
    )
