"""Memory, time and fit of a run before it is made: the engine's own step over tensors that have shapes and no values.

See docs/planning.md.
"""

from __future__ import annotations

from .whole import Plan, plan

__all__ = ["Plan", "plan"]
