"""The report is one self-contained, well-formed page with everything in it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from comparison_helpers import BROKEN

from graftlm.comparison import ComparisonResult, MethodRun
from graftlm.comparison.charts import Series, line_chart, scatter_chart, spread_out
from graftlm.comparison.report import page

VOID = {"meta", "br"}


class Page(HTMLParser):
    """Collects tags, attributes and text; every tag that opens must close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def check_self_contained(text: str) -> Page:
    found = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(found.tags)
    assert not [a for a in found.attributes if a[0] in ("src", "href", "srcset", "xlink:href") or a[0].startswith("on")]
    assert not re.search(r"https?:|//[a-z]|url\(|@import", text)
    assert "nan" not in re.findall(r'"[^"]*"', text)
    return found


def test_contents(result):
    found = check_self_contained(result.report_path.read_text())
    for run in result.runs:
        assert run.label in found.text
    assert found.tags.count("svg") == 8
    assert "r=-1" in found.text, BROKEN
    assert f"{result.base_metrics['loss']:.3f}" in found.text
    assert f"{result.base_parameters:,}" in found.text
    assert found.tags.count("details") == len([r for r in result.runs if r.recipe])
    assert "learning_rate" in found.text and result.runs[0].samples[0]["prompt"] in found.text
    assert "prefers-color-scheme:dark" in result.report_path.read_text()


def test_texts_of_the_data_cannot_break_out():
    evil = '<script>alert("x")</script> & \'"'
    run = MethodRun(label=f"lora:{evil}", method="lora", seed=0, directory="x", status="done", recipe=evil)
    run.metrics = {"loss": 1.0, "accuracy": 0.5, "trainable_parameters": 10, "file_bytes": 5}
    run.samples = [{"prompt": evil, "target": evil, "before": evil, "after": evil}]
    bad = MethodRun(label="bad", method="lora", seed=0, directory="y", status="failed", error=evil)
    result = ComparisonResult(
        base=evil, data=evil, output_dir=Path("x"), base_metrics={"loss": 2.0, "accuracy": 0.0}, runs=[run, bad]
    )
    assert check_self_contained(page(result)).text.count("<script>") >= 6


@pytest.mark.parametrize("runs", [[], [MethodRun("lora", "lora", 0, "x")]])
def test_before_anything_is_finished(runs):
    assert (
        "No method finished"
        in check_self_contained(page(ComparisonResult(base="b", data="d", output_dir=Path("x"), runs=runs))).text
    )


def test_without_labels_the_loss_counts():
    run = MethodRun(
        "lora", "lora", 0, "x", status="done", metrics={"loss": 1.5, "accuracy": None, "trainable_parameters": 8}
    )
    result = ComparisonResult(
        base="b", data="d", output_dir=Path("x"), base_metrics={"loss": 2.0, "accuracy": None}, runs=[run]
    )
    found = check_self_contained(page(result))
    assert result.quality == "loss" and "Accuracy" not in found.text


def test_charts_of_odd_data():
    assert line_chart([], "t", "x", "y") == "" == scatter_chart([Series("a", 0, [(0, 1)])], "t", "x", "y", str)
    for points in ([(0, 1.0)], [(0, 0.0), (1, 0.0)], [(0, 1e-9), (1, 1e9)], [(i, -i) for i in range(40)]):
        check_self_contained(f"<main>{line_chart([Series('a', 9, points)], 't', 'x', 'y')}</main>")
    same = [Series(str(i), i, [(100, 0.5)]) for i in range(9)]
    check_self_contained(f"<main>{scatter_chart(same, 't', 'x', 'y', str, ('base', 0.5))}</main>")


def test_labels_keep_apart():
    placed = spread_out([5.0, 5.0, 6.0, 90.0], 0, 100, gap=10)
    assert all(b - a >= 10 for a, b in zip(sorted(placed), sorted(placed)[1:], strict=False))
