"""benchmarks/fleet.py: its clock is right, what it skips changes nothing, and it tells the policies apart."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from fleet import Costs, Fleet, Limits, Node, Wanted, jain, zipf  # noqa: E402

COSTS = Costs(step=0.03, row=0.004, token=0.0015, group=0.0005, load=0.05)


def test_one_request_takes_what_its_steps_take() -> None:
    found = Fleet(1, Limits(step_tokens=64), COSTS, "affinity").run([Wanted(1.0, "a", 100, 5)])
    prompt = 2 * (COSTS.step + COSTS.group) + 100 * COSTS.token
    decoding = 4 * (COSTS.step + COSTS.row + COSTS.group)
    assert found.first[0] == pytest.approx(COSTS.load + prompt)
    assert found.whole[0] == pytest.approx(COSTS.load + prompt + decoding)
    assert (found.hits, found.loads, found.tokens) == (0, 1, 5)
    assert found.busy == [pytest.approx(found.whole[0])]


def test_two_requests_share_their_steps() -> None:
    two = [Wanted(0.0, "", 1, 10), Wanted(0.0, "", 1, 10)]
    found = Fleet(1, Limits(), COSTS, "affinity").run(two)
    apart = Fleet(1, Limits(rows=1), COSTS, "affinity").run(two)
    assert found.seconds < 0.7 * apart.seconds


@pytest.mark.parametrize("policy", ["affinity", "least", "random"])
def test_going_over_steps_at_once_changes_nothing(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = list(zipf(300, 40, rate=12.0))
    limits = Limits(rows=6, room=6, most=30)
    fast = Fleet(3, limits, COSTS, policy).run(trace)
    step = Node.step

    def single(self: Node, now: float) -> float | None:
        if step(self, now) is None:
            return None
        self.steps = 1
        return self.end

    monkeypatch.setattr(Node, "step", single)
    slow = Fleet(3, limits, COSTS, policy).run(trace)
    assert list(fast.whole) == pytest.approx(list(slow.whole)) and list(fast.first) == pytest.approx(list(slow.first))
    assert (fast.hits, fast.loads, fast.refused, fast.tokens) == (slow.hits, slow.loads, slow.refused, slow.tokens)
    assert fast.busy == pytest.approx(slow.busy)


def test_every_request_ends_or_is_refused() -> None:
    trace = list(zipf(400, 100, rate=200.0))
    found = Fleet(2, Limits(rows=4, room=3, most=20), COSTS, "affinity").run(trace)
    assert found.requests + found.refused == 400 and found.refused > 0


def test_affinity_finds_adapters_where_they_are_and_keeps_the_balance() -> None:
    """64 adapters by Zipf's law on 8 replicas with room for 8 each, as in the issue's figure."""
    trace = list(zipf(1200, 64, rate=15.0, new=(4, 12)))
    lines: dict[str, dict[str, Any]] = {}
    for policy in ("affinity", "least", "random"):
        lines[policy] = Fleet(8, Limits(room=8), COSTS, policy).run(trace).figures()
    assert lines["affinity"]["hits"] >= 0.9 > 0.6 > max(lines["least"]["hits"], lines["random"]["hits"])
    assert lines["affinity"]["busiest"] < 1.5 and lines["affinity"]["fairness"] > 0.9
    assert lines["affinity"]["whole_p99"] < lines["random"]["whole_p99"]


def test_jain() -> None:
    assert jain([1.0, 1.0]) == 1 and jain([1.0, 0.0, 0.0, 0.0]) == 0.25


def test_zipf() -> None:
    found = list(zipf(2000, 10, rate=5.0))
    counts = [sum(w.adapter == f"a{i}" for w in found) for i in range(10)]
    assert counts[0] > 1.5 * counts[1] > 2 * counts[5] and found[-1].at == pytest.approx(400, rel=0.1)
