"""Paths, names, records and the index."""

from __future__ import annotations

import json
import os
import time

import pytest
from studio_helpers import client, studio

from graftlm.studio import records
from graftlm.studio.errors import PageError
from graftlm.studio.index import Index
from graftlm.studio.workspace import Workspace, slug


@pytest.fixture
def places(tmp_path):
    """A workspace, a folder that was given, and one that was not."""
    for name in ("given", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text("{}\n")
    return Workspace(tmp_path / "workspace", [tmp_path / "given"]), tmp_path


def test_paths_inside(places):
    workspace, tmp = places
    (workspace.data / "a.csv").write_text("a\n1\n")
    assert workspace.path("data/a.csv") == workspace.data / "a.csv"
    assert workspace.path(str(tmp / "given" / "rows.jsonl")).name == "rows.jsonl"
    assert workspace.path("../given/rows.jsonl").parent.name == "given"
    assert workspace.shown(workspace.data / "a.csv") == "data/a.csv"


@pytest.mark.parametrize(
    "text",
    ["../other/rows.jsonl", "{tmp}/other/rows.jsonl", "/etc/passwd", "~/.bashrc", "data/../../other", "/", ".studio/key",
     "data/../.studio/index.sqlite", "{tmp}/given/../other/rows.jsonl"],
)  # fmt: skip
def test_paths_outside(places, text):
    workspace, tmp = places
    with pytest.raises(PageError, match="outside") as refused:
        workspace.path(text.format(tmp=tmp))
    assert refused.value.status == 403


def test_links_are_resolved(places):
    workspace, tmp = places
    (workspace.data / "link").symlink_to(tmp / "other")
    (workspace.data / "file.jsonl").symlink_to(tmp / "other" / "rows.jsonl")
    (workspace.data / "circle").symlink_to(workspace.data / "circle")
    (workspace.runs / "elsewhere").symlink_to(tmp / "other")
    for text in ("data/link/rows.jsonl", "data/file.jsonl"):
        with pytest.raises(PageError, match="outside"):
            workspace.path(text)
    with pytest.raises(PageError):
        workspace.path("data/circle")
    with pytest.raises(PageError, match="no run"):
        workspace.run("elsewhere")
    with pytest.raises(PageError, match="no path"):
        workspace.path("data/\0")


@pytest.mark.parametrize("name", ["..", ".", "../runs", "a/b", "", ".hidden", "x" * 200, "a\0"])
def test_names_that_are_none(places, name):
    workspace, _ = places
    (workspace.runs / ".hidden").mkdir()
    with pytest.raises(PageError, match="no run"):
        workspace.run(name)


def test_new_names(places):
    workspace, _ = places
    assert [workspace.new_run("My run: 1/2").name for _ in range(3)] == ["My-run-1-2", "My-run-1-2-2", "My-run-1-2-3"]
    assert workspace.new_file("../../../x y.csv").parent == workspace.data
    for text in ("", "..", "../..", "训练", "-", "." * 50, "a" * 500, "\0"):
        made = slug(text)
        assert made and "/" not in made and not made.startswith(".") and ".." not in made and len(made) <= 60


def test_records_are_whole(tmp_path):
    file = tmp_path / "state.json"
    assert records.read(file) == {}
    records.write(file, {"a": 1})
    assert records.read(file) == {"a": 1} and os.listdir(tmp_path) == ["state.json"]
    for text in ('{"a": ', "[1]", ""):
        file.write_text(text)
        assert records.read(file) == {}


def a_run(workspace: Workspace, name: str, **metrics: float) -> None:
    folder = workspace.runs / name
    folder.mkdir()
    (folder / "recipe.yaml").write_text(f"method: lora\nbase: some-base\ndata: {{source: {name}-rows}}\n")
    (folder / "metrics.json").write_text(json.dumps({"metrics": metrics}))


def test_the_index_is_made_of_the_folders(tmp_path):
    workspace = Workspace(tmp_path)
    a_run(workspace, "one", loss=1.5, loss_before=3.0)
    (workspace.data / "rows.csv").write_text("a\n1\n")
    records.write(workspace.chats / "c.json", {"title": "Hello", "base": "b", "turns": [{"vote": "x"}, {}]})
    index = Index(workspace)
    assert [(r.name, r.method, r.loss, r.state, r.data) for r in index.runs()] == [("one", "lora", 1.5, "done", "one-rows")]
    assert [d.path for d in index.data_sets()] == ["data/rows.csv"] and index.chats()[0].votes == 1
    a_run(workspace, "two")
    (workspace.data / "rows.csv").unlink()
    index.sync()
    assert {r.name for r in index.runs()} == {"one", "two"} and not index.data_sets()
    assert [r.name for r in index.runs(text="two-rows")] == ["two"] and index.count(text="%") == 0
    (tmp_path / ".studio" / "index.sqlite").unlink()
    assert {r.name for r in Index(workspace).runs()} == {"one", "two"}
    assert Index(workspace).rebuild() == {"Run": 2, "DataSet": 0, "Chat": 1}


def test_an_index_of_another_version_is_made_anew(tmp_path):
    workspace = Workspace(tmp_path)
    a_run(workspace, "one")
    index = Index(workspace)
    with index.engine.begin() as connection:
        connection.exec_driver_sql("PRAGMA user_version = 999")
        connection.exec_driver_sql("DROP TABLE run")
    assert [r.name for r in Index(workspace).runs()] == ["one"]


def test_thousands_of_runs_do_not_slow_the_pages(tmp_path):
    """A page that shows the last of 5,000 runs takes the processor as long as one of a few, and no list is endless."""
    made = studio(tmp_path)
    for i in range(5000):
        (made.workspace.runs / f"run-{i:04}").mkdir()
    made.index.sync()
    browser = client(made)
    spent = {}
    for place in ("/", "/runs", "/runs?q=499"):
        times = []
        for _ in range(5):
            begun = time.process_time()
            answer = browser.get(place)
            times.append(time.process_time() - begun)
        assert answer.status_code == 200 and answer.text.count("<tr>") <= 52
        spent[place] = sorted(times)[2]
    assert max(spent.values()) < 0.1, spent
    assert "5000" in browser.get("/runs").text and "page=2" in browser.get("/runs").text
