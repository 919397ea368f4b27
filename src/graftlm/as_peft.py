"""GraftLM under the name `peft`, for programs that import it or ask `isinstance(model, peft.PeftModel)`.

    graftlm.as_peft()                        # for this process, from here on
    graftlm.as_peft.undo()
    python -m graftlm.as_peft script.py …    # the same for a script, as `graftlm run script.py …`

It is never done without being asked for. `import peft` and `from peft.… import` give GraftLM's names, whether HF PEFT is
installed or not; a name that GraftLM lacks raises `ImportError` with the reason. `importlib.metadata.version("peft")` gives
the version whose names these are, so that checks of transformers, accelerate and TRL pass. Modules that were imported before
and that import from `peft` at their top (transformers' trainer, TRL) do so again.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import re
import runpy
import sys
from collections.abc import Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from . import naming
from .compat.names import MODULES, VERSION, reason

NAME = "peft"
ROOT = __name__.rpartition(".")[0]
IMPORTS = re.compile(rb"^\s*(from|import)\s+peft\b", re.MULTILINE)


class Renamed(ModuleType):
    """One module of `peft`: names of GraftLM, looked up when they are asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__version__":
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        inner = f"{self.__name__}.{name}"
        if known(inner):
            return importlib.import_module(inner)
        found = lookup(self.__name__, name)
        setattr(self, name, found)
        return found

    def __dir__(self) -> list[str]:
        own = importlib.import_module(ROOT)
        return sorted({*own.__all__, *MODULES[below(self.__name__)]})


def below(fullname: str) -> str:
    """`utils.other` for peft.utils.other, "" for peft itself."""
    return fullname.partition(".")[2]


def known(fullname: str) -> bool:
    return fullname.partition(".")[0] == NAME and below(fullname) in MODULES


def lookup(module: str, name: str) -> Any:
    """What `module` has under a name.

    Raises:
        ImportError: HF PEFT has this name and GraftLM has not.
        AttributeError: neither has it.
    """
    if name == "__version__":
        return VERSION
    if home := MODULES[below(module)].get(name):
        place, _, attribute = home.partition(":")
        return getattr(importlib.import_module(f"{ROOT}.{place}"), attribute)
    for place in (ROOT, f"{ROOT}.utils"):
        if (found := getattr(importlib.import_module(place), name, None)) is not None:
            return found
    if (why := reason(name)) is not None:
        raise ImportError(f"{module}.{name} is not in GraftLM, which stands in for peft here: {why}.", name=name)
    raise AttributeError(f"module {module!r} (GraftLM's) has no attribute {name!r}")


class Distribution(importlib.metadata.Distribution):
    """What `importlib.metadata` says of `peft`."""

    def read_text(self, filename: str) -> str | None:
        found = {
            "METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\nSummary: GraftLM under this name\n",
            "top_level.txt": f"{NAME}\n",
        }
        return found.get(filename)

    def locate_file(self, path: Any) -> Any:
        return Path(__file__).parent / path


class Finder(MetaPathFinder, Loader):
    """Finds `peft`, its modules, and its distribution."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] != NAME:
            return None
        if not known(fullname):
            raise ModuleNotFoundError(f"No module named {fullname!r} in GraftLM, which stands in for peft.", name=fullname)
        return ModuleSpec(fullname, self, origin=__file__, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Renamed(spec.name, importlib.import_module(ROOT).__doc__)

    def exec_module(self, module: ModuleType) -> None:
        module.__file__ = __file__

    def find_distributions(self, context: Any = None) -> Iterator[importlib.metadata.Distribution]:  # type: ignore[override]
        if getattr(context, "name", None) in (None, NAME):
            yield Distribution()


FINDER = Finder()
_before: list[tuple[dict[str, Any], str, Any]] = []  # (a module's names, one of them, what it was or MISSING)
MISSING = object()


def active() -> bool:
    """Whether `peft` is GraftLM now."""
    return FINDER in sys.meta_path


def start() -> None:
    """Put GraftLM under the name `peft`; nothing where it is so already."""
    if active():
        return
    for name in [n for n in sys.modules if n.partition(".")[0] == NAME]:
        replace(sys.modules, name, MISSING)
    sys.meta_path.insert(0, FINDER)
    naming.under_peft = True
    for module in importers():
        import_again(module)


def undo() -> None:
    """Take GraftLM from the name `peft`: all is again as it was before `as_peft()`."""
    if not active():
        return
    sys.meta_path.remove(FINDER)
    naming.under_peft = False
    for name in [n for n in sys.modules if n.partition(".")[0] == NAME]:
        del sys.modules[name]
    told = {id(names) for names, _, _ in _before}
    restore()
    for module in importers():
        forget_answers(module)
        if id(vars(module)) not in told:  # it came meanwhile: it imports from HF PEFT now, where that is installed
            import_again(module)
    _before.clear()


def restore() -> None:
    """Give the names back what they were."""
    while _before:
        names, name, value = _before.pop()
        if value is MISSING:
            names.pop(name, None)
        else:
            names[name] = value


def replace(names: Any, name: str, value: Any) -> None:
    """Set (MISSING: delete) one of a module's names, and keep what it was for `undo`."""
    _before.append((names, name, names.get(name, MISSING)))
    if value is MISSING:
        names.pop(name, None)
    else:
        names[name] = value


# -- modules that were imported before -----------------------------------------------------------------------------------
def importers() -> list[ModuleType]:
    """Loaded modules of other programs whose source imports from `peft`."""
    found = []
    for name, module in list(sys.modules.items()):
        path, root = vars(module).get("__file__") or "", name.partition(".")[0]
        if root in (NAME, ROOT, "__main__", "torch") or root in sys.stdlib_module_names or not path.endswith(".py"):
            continue
        if asks_for_peft(path):
            found.append(module)
    return found


@functools.cache
def asks_for_peft(path: str) -> bool:
    """Whether a source file imports from `peft`, or asks whether it is there."""
    try:
        source = Path(path).read_bytes()
    except OSError:
        return False
    return b"is_peft_available" in source or IMPORTS.search(source) is not None


def import_again(module: ModuleType) -> None:
    """Let imports from `peft` at a module's top (or under a condition there) take effect anew; what is not found stays."""
    forget_answers(module)
    for statement in imports_at_top(ast.parse(Path(str(module.__file__)).read_bytes())):
        for alias in statement.names:
            single = ast.copy_location(type(statement)(**{**vars(statement), "names": [alias]}), statement)
            made: dict[str, Any] = {"__name__": module.__name__, "__package__": module.__package__}
            before = set(made)
            try:
                exec(compile(ast.Module([single], []), str(module.__file__), "exec"), made)
            except ImportError:
                continue
            for name in made.keys() - before - {"__builtins__"}:
                replace(vars(module), name, made[name])


def imports_at_top(tree: ast.AST) -> Iterator[Any]:
    """Statements that import from `peft`, outside of functions and of what is for types only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            sources = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            if any(source.partition(".")[0] == NAME for source in sources) and not getattr(node, "level", 0):
                yield node
        elif isinstance(node, (ast.If, ast.Try, ast.ExceptHandler)) and "TYPE_CHECKING" not in ast.dump(
            getattr(node, "test", ast.Pass())
        ):
            yield from imports_at_top(node)


def forget_answers(module: ModuleType) -> None:
    """Clear what a module's functions about `peft` (`is_peft_available`) keep of their answers."""
    for name, value in vars(module).items():
        if NAME in name and callable(getattr(value, "cache_clear", None)):
            value.cache_clear()


# -- scripts -------------------------------------------------------------------------------------------------------------
def run(arguments: list[str]) -> None:
    """Run a script (or `-m module`) with its arguments under `as_peft()`, as `python` would."""
    module = arguments[0] == "-m"
    target, rest = (arguments[1], arguments[2:]) if module else (arguments[0], arguments[1:])
    start()
    sys.argv = [target, *rest]
    if module:
        sys.path.insert(0, "")
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(target).resolve().parent))
        runpy.run_path(target, run_name="__main__")


class _Called(ModuleType):
    """This module is called: `graftlm.as_peft()`."""

    def __call__(self) -> None:
        start()


sys.modules[__name__].__class__ = _Called

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1:2] == ["-m"] and len(sys.argv) < 3:
        raise SystemExit("usage: python -m graftlm.as_peft script.py [argument …]   (or -m module [argument …])")
    from graftlm import as_peft  # this file runs under another name

    as_peft.run(sys.argv[1:])
