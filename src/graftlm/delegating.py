"""How a wrapper passes for the model that it wraps: the base's own signature, and its answers to what it has none for."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Container
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .quantization import settle

_CLASSES: dict[tuple[Any, Any, bool], Any] = {}


def class_over(cls: Any, base: Any, plain: bool = False) -> Any:
    """The wrapper class `cls` with the base's own forward signature, which a Trainer reads to keep a data set's columns.

    Over a `plain` base, any torch module, it is moved, cast and switched to training as torch does it: transformers looks
    for what its own models have.
    """
    if (cls, base, plain) in _CLASSES:
        return _CLASSES[cls, base, plain]
    signature = inspect.signature(base.forward)
    names = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    rest = [p for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    mixed = inspect.Parameter("adapter_names", inspect.Parameter.KEYWORD_ONLY, default=None)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward with the active adapters; `adapter_names` chooses others for this call."""
        return self._run(*args, **kwargs)

    forward.__signature__ = signature.replace(parameters=[*names, mixed, *rest])  # type: ignore[attr-defined]
    own = {n: f for n, f in vars(nn.Module).items() if getattr(cls, n) is vars(PreTrainedModel).get(n)} if plain else {}
    body = own | {"forward": forward, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return _CLASSES.setdefault((cls, base, plain), type("PeftModel", (cls,), body))


def rebuild(cls: Any, base: type, state: bytes, plain: bool) -> Any:
    """A wrapper out of its pickle."""
    made = object.__new__(class_over(cls, base, plain))
    made.__dict__.update(pickle.loads(state))
    settle(made.base)
    made._connect()
    return made


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
