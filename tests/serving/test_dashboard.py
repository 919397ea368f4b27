"""The Grafana dashboard asks for measures that the server has, and for all of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("prometheus_client", reason="the extra `serve` is not installed")

from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

from graftlm.serving.metrics import Load, Metrics  # noqa: E402

DASHBOARD = Path(__file__).parents[2] / "docs" / "serving-dashboard.json"


def labels() -> dict[str, set[str]]:
    """All series of a server that has answered something, with their labels."""
    metrics = Metrics("tiny", lambda: Load(1, 0, 0.5, 4, ("a",), (), {"loaded": 1, "failed": 0, "evicted": 1}))
    for measure in (metrics.first, metrics.between, metrics.queue, metrics.whole):
        metrics.of(measure).observe(0.1)
    for measure in (metrics.prompts, metrics.written):
        metrics.of(measure).inc()
    metrics.by_adapter.labels("a", "prompt").inc()
    metrics.requests.labels("chat", "200").inc()
    families = text_string_to_metric_families(metrics.text().decode())
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


def test_every_measure_and_label_exists() -> None:
    known = labels()
    panels = json.loads(DASHBOARD.read_text())["panels"]
    asked = [(p["title"], t["expr"], t["legendFormat"]) for p in panels for t in p["targets"]]
    used = set()
    for title, expression, legend in asked:
        names = re.findall(r"\b(?:vllm:|graftlm_)\w+", expression)
        assert len(names) == 1 and names[0] in known, (title, expression)
        used.add(names[0])
        own = known[names[0]]
        wanted = {*re.findall(r"\{\{(\w+)\}\}", legend), *re.findall(r"(\w+)=~", expression)}
        wanted |= {label for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(", ")}
        assert wanted <= own, (title, wanted - own)
    bare = {re.sub(r"_(bucket|sum|count)$", "", name) for name in known if not name.endswith("_created")}
    assert {re.sub(r"_bucket$", "", name) for name in used} == bare


def test_panels_do_not_overlap() -> None:
    places = [p["gridPos"] for p in json.loads(DASHBOARD.read_text())["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
