"""One call of a wrapper: its plan, one pass of the base, and what that pass ended with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..routing import Plan, running
from .state import Pass, Probe, Run

if TYPE_CHECKING:
    from ..adapters import AdapterSet


def run(
    host: AdapterSet, plan: Plan, inputs: dict[str, Any], *args: Any, smoothing: float = 0.0, probe: Probe | None = None
) -> tuple[Pass, Any]:  # fmt: skip
    """One forward of the base under `plan`.

    Returns:
        The finished pass, for its `.losses`, `.hidden` and layout, and the base's output.
    """
    call = Run(smoothing=smoothing, probe=probe)
    with running(plan), call.going():
        output = host.base_model(*args, **inputs)
    assert call.ended is not None
    host.watch_pass(output, call.ended.hidden, call.ended.losses)
    return call.ended, output
