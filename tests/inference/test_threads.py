"""Work in threads of its own, which are gone afterwards."""

from __future__ import annotations

import threading

import pytest

from graftlm.inference.threads import apart, begin


def test_what_work_gives_and_raises() -> None:
    before = threading.active_count()
    assert apart(lambda: threading.current_thread()) is not threading.current_thread()
    with pytest.raises(ZeroDivisionError):
        apart(lambda: 1 / 0)
    assert threading.active_count() == before


def test_a_thread_that_works_beside() -> None:
    goes_on, seen = threading.Event(), []
    thread = begin(lambda: seen.append(goes_on.wait(30)), "beside")
    assert thread.daemon and thread.name == "beside" and not seen
    goes_on.set()
    thread.join(30)
    assert seen == [True]
