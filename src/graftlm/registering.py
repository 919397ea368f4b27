"""Makes ChatGLM known to transformers' auto classes when one is first asked for, wherever graftlm was imported.

`import graftlm` imports neither torch nor transformers. So nothing is registered at once: transformers' tables of
configurations (which every auto class reads first) and of tokenizer classes (for a folder with a tokenizer alone) are
given an entry that registers everything, by importing `architectures`, when our model is looked up in them.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

# module of transformers -> the dictionary in it, and our model's key
TABLES = {
    "transformers.models.auto.configuration_auto": ("CONFIG_MAPPING._extra_content", "chatglm"),
    "transformers.models.auto.tokenization_auto": ("REGISTERED_TOKENIZER_CLASSES", "ChatGLMTokenizer"),
}


class Table(dict):
    """A table of transformers in which one key is registered as soon as it is asked for."""

    def __init__(self, content: dict, own: str) -> None:
        super().__init__(content)
        self.own = own

    def __contains__(self, key: object) -> bool:
        if key == self.own and not super().__contains__(key):
            importlib.import_module("graftlm.architectures")
        return super().__contains__(key)


def watch(module: Any) -> None:
    """Let the table in that module answer for our model. (Without such a table, registering waits for `graftlm`'s names.)"""
    path, own = TABLES[module.__name__]
    *parents, last = path.split(".")
    for parent in parents:
        module = getattr(module, parent, None)
    content = getattr(module, last, None)
    if isinstance(content, dict) and not isinstance(content, Table):
        setattr(module, last, Table(content, own))


class WhenImported(MetaPathFinder):
    """Calls `watch` for each of the modules when it has been imported."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in TABLES else None
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_watch(module: Any) -> None:
            run(module)
            watch(module)

        spec.loader.exec_module = run_and_watch  # type: ignore[method-assign]
        return spec


def register_on_demand() -> None:
    """Watch the tables: now where transformers was imported before, else when it will be."""
    for name in TABLES:
        if name in sys.modules:
            watch(sys.modules[name])
    sys.meta_path.insert(0, WhenImported())
