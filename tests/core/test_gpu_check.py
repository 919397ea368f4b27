"""`scripts/gpu_check.py`, without a GPU: what it would do, and what it writes of parts that end in different ways."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    place = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts" / "gpu_check.py")
    assert place is not None and place.loader is not None
    module: ModuleType = importlib.util.module_from_spec(place)
    monkeypatch.setitem(sys.modules, "gpu_check", module)
    place.loader.exec_module(module)
    return module


def test_without_a_gpu_it_tells_what_it_would_do(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    monkeypatch.setattr(script, "device", lambda: None)
    assert script.main(["--json", str(tmp_path / "out.json")]) == 0
    told = capsys.readouterr().out
    assert "no GPU" in told and all(part.name in told for part in script.PARTS)
    assert not (tmp_path / "out.json").exists()


def test_the_parts_are_there_and_end_within_eight_minutes(script: Any) -> None:
    assert sum(part.limit for part in script.PARTS) <= 480
    for part in script.PARTS:
        for word in part.command:
            assert not word.endswith(".py") or (ROOT / word).is_file(), word


def test_each_part_is_written_however_it_ends(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    good = "import sys; open(sys.argv[1], 'w').write('[{\"ratio\": 2}]'); print('fine')"
    parts = (
        script.Part("late", ("-c", "import time; print('begun', flush=True); time.sleep(60)"), 2),
        script.Part("broken", ("-c", "raise SystemExit('no such kernel')"), 20),
        script.Part("silent", ("-c", "pass", "{json}"), 20),
        script.Part("cut", ("-c", good.replace("}]", "") + "; sys.exit(1)", "{json}"), 20),
        script.Part("good", ("-c", good, "{json}"), 20),
    )
    monkeypatch.setattr(script, "PARTS", parts)
    monkeypatch.setattr(script, "device", lambda: {"name": "a GPU"})
    assert script.main(["--json", str(tmp_path / "out.json")]) == 1
    report = json.loads((tmp_path / "out.json").read_text())
    found = report["parts"]
    assert {k: v["status"] for k, v in found.items()} == {
        "late": "out of time", "broken": "failed", "silent": "failed", "cut": "failed", "good": "done"
    }  # fmt: skip
    assert "begun" in found["late"]["output"] and "no such kernel" in found["broken"]["output"]
    assert "results" not in found["cut"]  # its file ends in the middle of a value
    assert found["good"]["results"] == [{"ratio": 2}]
    assert report["device"] == {"name": "a GPU"} and report["versions"]["torch"]
    assert script.main(["--json", str(tmp_path / "out.json"), "--only", "good"]) == 0
