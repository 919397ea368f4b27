"""Two processes with half of each batch follow one process with all of it: losses, measures, parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_runs import CASES, in_two_processes, process, result_of

from graftlm.kernels import linear


@pytest.fixture(autouse=True)
def one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "way", lambda dtype, rows, transposed: torch.nn.functional.linear)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What two processes made of every case, by the number of steps; they are started once."""
    done: dict[int, Path] = {}

    def found(name: str, steps: int) -> list[dict[str, Any]]:
        if steps not in done:
            done[steps] = tmp_path_factory.mktemp(f"steps-{steps}")
            in_two_processes(process, list(CASES), steps, done[steps])
        return [torch.load(done[steps] / f"{name}.{rank}.pt") for rank in range(2)]

    return found


@pytest.mark.parametrize("steps", [3, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_two_processes_follow_one(name: str, steps: int, of_two: Any, tmp_path: Path) -> None:
    first, second = of_two(name, steps)
    assert "error" not in first, first["error"]
    alone = result_of(CASES[name], steps, tmp_path)
    for key in ("loss", "eval_loss", "epoch_train_loss"):
        assert len(first[key]) and first[key] == pytest.approx(alone[key], abs=1e-5), key
    assert first["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
    assert first["parameters"].keys() == alone["parameters"].keys()
    for key, value in alone["parameters"].items():
        assert torch.equal(first["parameters"][key], second["parameters"][key]), key
        error = (first["parameters"][key] - value).abs().max() / value.abs().max()
        assert error <= 1e-5, (key, float(error))
