"""Rows of a plan: all of a small data set, a sample of a large file."""

from __future__ import annotations

import csv
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from graftlm.errors import DataError, PlanError
from graftlm.planning import rows, sampling
from graftlm.planning.rows import longest_batch, rows_given, rows_of
from graftlm.training import Recipe

COUNT = 3000


def texts() -> list[str]:
    """Of 3 to 42 words, one of 100."""
    lengths = [3 + (i * 7919) % 40 for i in range(COUNT)]
    lengths[1234] = 100
    return [" ".join(["the"] * n) for n in lengths]


def written(path: Path) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": x}) + "\n\n" for x in texts()), encoding="utf-8")
        return path
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["text", "other"], *([x, 'a "quoted"\nvalue'] for x in texts())])
    return path


def of(source: Path, **data: Any) -> rows.Rows:
    return rows_of(Recipe.from_dict({"data": {"source": str(source), "format": "text", **data}}))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_a_sample_shows_what_the_file_holds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / name)
    whole = of(path, holdout=0.1)
    monkeypatch.setattr(sampling, "LARGE", 1000)
    monkeypatch.setattr(sampling, "SAMPLE", 400)
    found = of(path, holdout=0.1)
    assert (found.data, len(found.train.rows)) == (None, 360)
    assert found.train.count == whole.train.count == 2700 and found.held.count == whole.held.count
    assert found.train.tokens == pytest.approx(whole.train.tokens, rel=0.1)
    assert found.data_bytes == pytest.approx(whole.data_bytes, rel=0.2)
    assert found.summary()["longest"] == max(whole.summary()["longest"], max(whole.held.lengths))
    assert longest_batch(Recipe.from_dict({"training": {"batch_size": 2}}), found)["input_ids"].shape[1] >= 100
    assert of(path, holdout=0, max_examples=50).train.count == 50


def test_a_large_file_is_not_held(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for i in range(60_000):
            file.write(json.dumps({"text": f"{i} " + "x" * 300}) + "\n")
    tracemalloc.start()
    found = sampling.sample(path, tmp_path)
    highest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.rows == 60_000 and highest < path.stat().st_size / 3


def test_texts_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "\xff\xfe"}\n')
    with pytest.raises(DataError, match="UTF-8"):
        sampling.sample(path, tmp_path)
    table = tmp_path / "rows.csv"
    table.write_text('text\n"open\n', encoding="utf-8")
    with pytest.raises(DataError, match="quoted"):
        sampling.sample(table, tmp_path)


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (-1, 5), (10**13, 5), (5, 10**7)])
def test_sizes_that_are_none(sizes: tuple[int, int]) -> None:
    with pytest.raises(PlanError, match="at least 1 and at most"):
        rows_given(*sizes)


def test_many_rows_of_one_length_are_not_made() -> None:
    found = rows_given(10**9, 200)
    assert found.train.count == 10**9 and found.train.tokens == 200 * 10**9 and len(found.train.rows) < 10_000
    assert longest_batch(Recipe.from_dict({"training": {"batch_size": 8}}), found)["input_ids"].shape == (8, 200)
    with pytest.raises(PlanError, match="batch_size"):
        longest_batch(Recipe.from_dict({"training": {"batch_size": 10**6}}), found)


def test_data_that_is_not_there() -> None:
    import graftlm

    with pytest.raises(DataError, match="--rows 1000 --length 200"):
        graftlm.plan(Recipe.from_dict({"data": {"source": "./nowhere.jsonl"}}))
