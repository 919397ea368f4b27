"""The first page: what is here, the last runs, and a first one; language and colours."""

from __future__ import annotations

from typing import Any

import psutil
from fastapi import APIRouter, Request, Response

from .. import bases, recipes, shown, words
from ..studio import THEME, THEMES, Studio

YEAR = 365 * 24 * 60 * 60


def router(studio: Studio) -> APIRouter:
    """Routes of the page."""
    made = APIRouter()

    @made.get("/")
    def start(request: Request, seen: str = "") -> Response:
        studio.refresh()
        found = here(studio)
        if request.headers.get("hx-target") == "now":
            return Response(status_code=204) if seen == found["seen"] else studio.page(request, "_now.html", **found)
        return studio.page(request, "start.html", **found)

    @made.post("/preferences")
    async def preferences(request: Request) -> Response:
        given = await request.form()
        answer = Response(status_code=204, headers={"HX-Refresh": "true"})
        for name, cookie, known in (("language", words.COOKIE, words.LANGUAGES), ("theme", THEME, THEMES)):
            if given.get(name) in known:
                answer.set_cookie(cookie, str(given[name]), max_age=YEAR, samesite="lax")
        return answer

    return made


def here(studio: Studio) -> dict[str, Any]:
    """What the page shows."""
    memory, runs = psutil.virtual_memory(), studio.index.runs(limit=6)
    return {
        "bases": bases.known(studio.workspace), "runs": runs, "seen": shown.mark(runs), "examples": recipes.EXAMPLES,
        "free": memory.available, "total": memory.total, "going": studio.jobs.going(), "waiting": studio.jobs.waiting(),
        "place": studio.workspace.root,
    }  # fmt: skip
