"""One file a page; each makes its router over a studio."""

from __future__ import annotations

from . import run, start, train

ROUTERS = (start.router, train.router, run.router)
