"""Comparisons of methods with their reports, and runs beside each other."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse

from .. import bases, recipes
from ..doors import REPORT_POLICY
from ..errors import PageError
from ..index import recipe_in
from ..studio import Studio
from ..workspace import slug
from .data import BUNDLED
from .run import View

METHODS = (  # of recipes, which this process does not import; without those that need options of their own
    "lora", "lora-int8", "qlora", "prompt-tuning", "p-tuning", "prefix-tuning", "bottleneck", "ia3", "adalora", "loha",
    "lokr", "vera", "randlora", "fourierft", "miss", "oft", "boft", "ln-tuning", "adaption-prompt", "cartridge",
)  # fmt: skip
USUAL = ("lora", "prompt-tuning", "p-tuning", "prefix-tuning", "bottleneck")
MOST = 8  # runs beside each other


def router(studio: Studio) -> APIRouter:
    """Routes of the pages."""
    made = APIRouter(prefix="/compare")

    @made.get("")
    def compare(request: Request) -> Response:
        studio.refresh()
        return studio.page(
            request, "compare.html", runs=studio.index.runs(limit=50, kind="compare"), methods=METHODS, usual=USUAL,
            bundled=BUNDLED, bases=bases.known(studio.workspace), data_sets=studio.index.data_sets(),
        )  # fmt: skip

    @made.post("/start")
    async def start(request: Request) -> Response:
        form = await request.form()
        data, base = str(form.get("data", "")).strip() or "tweets", str(form.get("base", "")).strip() or "graftlm-base"
        methods = [str(m) for m in form.getlist("method")]
        steps = str(form.get("steps", "")).strip()
        if not methods or any(m not in METHODS for m in methods):
            raise PageError(422, "Choose methods to compare.")
        if steps and not (steps.isdigit() and int(steps)):
            raise PageError(422, "Steps: expected a whole number, got {steps!r}.", steps=steps)
        if data.startswith("-") or base.startswith("-"):
            raise PageError(422, "No data set and no base begins with a dash.")
        wrong = recipes.outside(studio.workspace, f"base: {base!r}\ndata: {{source: {data!r}}}\n")
        if wrong:
            raise PageError(403, wrong[0]["text"])
        folder = studio.workspace.new_run(f"compare-{slug(data.rpartition('/')[2])}")
        args = ["compare", "--data", data, "--base", base, "--output", f"runs/{folder.name}/out", "--no-plan"]
        args += [a for m in methods for a in ("--method", m)] + (["--max-steps", steps] if steps else [])
        return await studio.begin(folder, "compare", args, title=f"{data}: {', '.join(methods)}")

    @made.get("/runs")
    def runs(request: Request) -> Response:
        names = list(dict.fromkeys(request.query_params.getlist("run")))
        if not 1 < len(names) <= MOST:
            raise PageError(422, "Choose two to {most} runs in the list of runs.", most=MOST)
        return studio.page(request, "beside.html", **beside(studio, names))

    @made.get("/{name}")
    def one(request: Request, name: str) -> Response:
        report(studio, name)
        return studio.page(request, "report.html", name=name)

    @made.get("/{name}/report")
    def shown(name: str) -> Response:
        return FileResponse(report(studio, name), media_type="text/html", headers={"Content-Security-Policy": REPORT_POLICY})

    return made


def report(studio: Studio, name: str) -> Any:
    """A comparison's report. PageError: there is none."""
    found = studio.workspace.run(name) / "out" / "report.html"
    if not found.is_file():
        raise PageError(404, "{name} has no report (yet).", name=name)
    return studio.workspace.path(str(found))


def beside(studio: Studio, names: list[str]) -> dict[str, Any]:
    """Runs' curves over each other, and the settings in which they differ."""
    curves, settings = {}, {}
    for name in names:
        view = View(studio, studio.workspace.run(name))
        view.read()
        found = view.curve()
        curves[name] = {s: loss for s, loss in zip(found["step"], found["held_out"], strict=True) if loss is not None}
        settings[name] = flat(recipe_in(view.folder) or {})
    steps = sorted({s for curve in curves.values() for s in curve})
    keys = sorted({k for found in settings.values() for k in found if k != "output_dir"})
    differ = [k for k in keys if len({repr(found.get(k)) for found in settings.values()}) > 1]
    return {
        "names": names, "curve": {"step": steps} | {n: [c.get(s) for s in steps] for n, c in curves.items()},
        "rows": [(key, [settings[n].get(key) for n in names]) for key in differ],
        "runs": [studio.index.run(n) for n in names],
    }  # fmt: skip


def flat(content: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Nested values by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{before}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found
