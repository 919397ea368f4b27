"""How a wrapper passes for the model that it wraps: the base's own signature, and its answers to what it has none for."""

from __future__ import annotations

import inspect
from collections.abc import Container
from typing import Any

_CLASSES: dict[tuple[Any, Any], Any] = {}


def class_over(cls: Any, base: Any) -> Any:
    """The wrapper class `cls` with the base's own forward signature, which a Trainer reads to keep a data set's columns."""
    if (cls, base) in _CLASSES:
        return _CLASSES[cls, base]
    signature = inspect.signature(base.forward)
    names = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    rest = [p for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    by_row = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in ("adapter_names", "task_ids")]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward with the active adapters; `adapter_names` chooses others for this call."""
        return self._run(*args, **kwargs)

    forward.__signature__ = signature.replace(parameters=[*names, *by_row, *rest])  # type: ignore[attr-defined]
    made = type("PeftModel", (cls,), {"forward": forward, "__module__": cls.__module__, "__doc__": cls.__doc__})
    return _CLASSES.setdefault((cls, base), made)


def answer_by_base(wrapper: Any, kind: type, taken: Container[str]) -> None:
    """Everything that a `kind` would answer by itself is asked of the base instead, except what is `taken`."""
    for name in dir(kind):
        if name not in taken and not (name.startswith("__") and name.endswith("__")):
            setattr(wrapper, name, _answered_by_base(name))


def _answered_by_base(name: str) -> property:
    def get(self: Any) -> Any:
        return getattr(self.base, name)

    def put(self: Any, value: Any) -> None:
        setattr(self.base, name, value)

    return property(get, put)
