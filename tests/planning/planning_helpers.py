"""A machine that was measured before."""

from __future__ import annotations

from graftlm.planning import machine as machines

KNOWN = machines.Machine(
    process_bytes=600 << 20,
    start_bytes=500 << 20,
    step_operations=2.5e10,
    bandwidth=5e9,
    call_seconds=2e-5,
)
