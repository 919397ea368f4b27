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


@pytest.mark.parametrize(("joining", "wanted"), [(1, 60), (2, 60), (4, 120), (8, 240), (30, 252)])
def test_the_more_wait_for_their_prompts_the_larger_is_their_share(joining: int, wanted: int) -> None:
    """Twice as many decode as join: the plain share. A burst beside few that decode comes in at once."""
    pace = Pace(256)
    for _ in range(50):
        pace.took(4, 0, STEP)
        pace.took(4, 60, STEP + 60 * 0.002)
    assert pace.tokens(4, joining) == pytest.approx(wanted, abs=2)


def test_a_burst_before_anything_is_known() -> None:
    assert Pace(256).tokens(1, 15) == 255


def test_what_prompts_cost_whatever_their_size_does_not_count_as_their_tokens() -> None:
    """A step of 0.1 s may take 0.12 s more: 0.04 of these for there being a prompt, 2 ms for each of 40 tokens."""
    pace = Pace(256)
    for count in (20, 60, 35) * 30:
        pace.took(4, 0, STEP)
        pace.took(4, count, STEP + 0.04 + count * 0.002)
    assert pace.tokens(4) == pytest.approx(40, abs=1)


def test_a_step_is_longer_the_more_rows_it_has() -> None:
    """Nothing has decoded in so many rows alone: 0.02 s and 0.01 a row; 1.2 of it are 0.264 s, 2 ms a token."""
    pace = Pace(256)
    for rows in (1, 3, 6, 2) * 20:
        pace.took(rows, 0, 0.02 + 0.01 * rows)
        pace.took(rows, 10 * rows, 0.02 + 0.01 * rows + 0.02 * rows)
    assert pace.tokens(20) == pytest.approx(132, abs=2)


def test_it_learns_where_no_step_is_without_prompts() -> None:
    pace = Pace(512)
    for _ in range(200):
        count = pace.tokens(16)
        pace.took(16, count, STEP + 0.01 + count * 0.002)
    assert 55 <= count <= 85  # what prompts cost whatever their size is not told from the step's own here
