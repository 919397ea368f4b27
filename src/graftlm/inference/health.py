"""How an engine does, for whoever watches it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Health:
    """How an engine does.

    Args:
        error: what it died of.
        silent: seconds since it last said anything, while there is work.
        running_adapters, waiting_adapters: names that requests go through, and that requests wait for.
    """

    alive: bool
    error: str | None
    silent: float
    waiting: int
    running: int
    cache_usage: float
    adapters: tuple[str, ...]
    running_adapters: tuple[str, ...]
    waiting_adapters: tuple[str, ...]
