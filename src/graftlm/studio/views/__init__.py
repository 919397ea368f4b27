"""One file a page; each makes its router over a studio."""

from __future__ import annotations

from . import adapters, chat, compare, data, run, start, train

ROUTERS = (start.router, data.router, train.router, run.router, compare.router, chat.router, adapters.router)
