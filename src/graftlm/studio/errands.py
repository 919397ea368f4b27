"""The process that has the libraries imported: checks recipes, plans runs, looks at data. `worker` asks it.

python -m graftlm.studio.errands          lines of JSON: {"id", "name", "values"} in, {"id", "answer" | "error"} out
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..errors import GraftError

THREADS = 3


def recipe_form(method: str = "lora") -> dict[str, Any]:
    """The form's fields, and those of a method."""
    from . import forms

    return {"fields": forms.fields(), "options": forms.option_fields(method)}


def check(values: dict[str, str] | None, text: str, others: Sequence[str] = ()) -> dict[str, Any]:
    """A recipe out of a form (`values`, over the YAML `text`) or out of the text alone: YAML, form, fields and problems.

    Args:
        others: recipes that are to train together with it.
    """
    from . import forms

    content, wrong = forms.read(text)
    yaml = text
    if values is not None and not wrong:  # else the text stays as it is, to be mended
        content = forms.from_form(values, content)
        yaml = forms.written(content)
    found = [{"key": "", "text": wrong}] if wrong else forms.problems(content)
    if others and not found:
        found = forms.apart([content, *(forms.read(other)[0] for other in others)])
    shown = forms.flat(content)
    return {
        "yaml": yaml, "values": shown, "problems": found,
        "form": recipe_form(shown.get("method", "lora")),
    }  # fmt: skip


def plan(texts: Sequence[str]) -> dict[str, Any]:
    """The plan of a recipe, or of several that train together, and where one does not fit, what would make it."""
    from ..planning import plan as planned
    from ..planning.mends import mends
    from ..training import Recipe
    from ..training.schema import load_yaml

    recipes = [Recipe.from_dict(load_yaml(text) or {}) for text in texts]
    made = planned(recipes)
    found = () if made.fits or len(recipes) > 1 else mends(recipes[0], made, {})
    return {
        "fits": made.fits, "needs": made.peak_bytes, "free": made.device.free_bytes, "time": times(made),
        "updates": made.updates, "trained": made.sizes.trained, "of": made.sizes.base,
        "rows": made.rows["rows"], "longest": made.rows["longest"], "together": made.together,
        "changes": [
            {
                "values": dict(entry.split("=", 1) for entry in mend.overrides), "needs": mend.plan.peak_bytes,
                "time": times(mend.plan), "fits": mend.plan.fits,
            }
            for mend in found
        ],
    }  # fmt: skip


def times(made: Any) -> list[float] | None:
    """The least and the most seconds of a plan; None where no time is known (it is not measured on this device)."""
    return None if made.device.gpu else [made.seconds[0], made.seconds[2]]


def look(source: str, base: str, **options: Any) -> dict[str, Any]:
    """A data set's rows, and what training makes of them."""
    from . import looking

    return looking.look(source, base, **options)


ERRANDS: dict[str, Callable[..., Any]] = {f.__name__: f for f in (recipe_form, check, plan, look)}


def answer(line: str) -> dict[str, Any]:
    """The answer to a line."""
    asked = json.loads(line)
    try:
        return {"id": asked["id"], "answer": ERRANDS[asked["name"]](**asked["values"])}
    except GraftError as error:
        return {"id": asked["id"], "error": str(error), "status": getattr(error, "status", 422)}
    except Exception as error:  # whatever a library raises: told, and written down whole
        traceback.print_exc()
        return {"id": asked["id"], "error": f"{type(error).__name__}: {error}", "status": 500}


def main() -> None:
    """Answer until the input ends."""
    writing = threading.Lock()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.getLogger("torchao").setLevel(logging.ERROR)
    from . import forms

    forms.fields()

    def work(line: str) -> None:
        text = json.dumps(answer(line), ensure_ascii=False, default=str)
        with writing:
            out.write(text + "\n")
            out.flush()

    with ThreadPoolExecutor(THREADS) as pool:
        for line in sys.stdin:
            pool.submit(work, line)
    os._exit(0)


if __name__ == "__main__":
    main()
