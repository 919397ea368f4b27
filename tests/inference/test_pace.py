"""How many tokens of prompts go beside rows that decode, on a clock of the test's own."""

from __future__ import annotations

import pytest

from graftlm.inference.pace import Pace

STEP = 0.1  # seconds of a step in which all rows decode


def test_nobody_waits_where_nobody_decodes() -> None:
    assert Pace(256).tokens(0) == 256


def test_the_least_until_both_times_are_known() -> None:
    pace = Pace(256)
    assert pace.tokens(4) == 16
    pace.took(0, 200, 9.0)  # prompts alone say nothing about a row that waits
    pace.took(4, 0, STEP)
    assert pace.tokens(4) == 16


@pytest.mark.parametrize(
    ("token", "wanted"),
    [(0.001, 120), (0.1, 16), (1e-9, 252)],
    ids=["between", "slow: the least", "fast: the step's tokens"],
)
def test_a_chunk_adds_what_it_may(token: float, wanted: int) -> None:
    pace = Pace(256)
    for _ in range(50):
        pace.took(4, 0, STEP)
        count = pace.tokens(4)
        pace.took(4, count, STEP + count * token)
    assert pace.tokens(4) == pytest.approx(wanted, abs=1)
