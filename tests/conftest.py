"""What stays for the whole session is kept from the garbage collector: every training run asks it to look through all, and
the libraries and thousands of tests take it longer than a tiny run's steps."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.hookimpl(hookwrapper=True)
def pytest_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """At the end of a file: what its tests made libraries import."""
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()
