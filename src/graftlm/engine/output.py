"""Outputs whose logits are made only if they are read, and hooks on the head that do not tie it to the wrapper."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from . import Engine

_LAZY: dict[type, type] = {}


def with_lazy_logits(output: Any, loss: Tensor, make: Callable[[], Tensor]) -> Any:
    """`output` (a transformers ModelOutput) with `loss`, its `logits` no item, and made by `make` when they are read."""
    kind = _LAZY.setdefault(type(output), _lazy_class(type(output)))
    # what makes them travels with the loss: accelerate builds the output anew from its items
    loss.logits_on_demand = make  # type: ignore[attr-defined]
    items = {k: v for k, v in output.items() if k not in ("logits", "loss")}
    return kind(loss=loss, **items)


def _lazy_class(kind: type) -> type:
    """A subclass of an output class whose `logits` are made when they are first read."""

    def logits(self: Any) -> Tensor:
        if "_logits" not in self.__dict__:
            self.__dict__["_logits"] = self.loss.logits_on_demand()
        return self.__dict__["_logits"]

    def put(self: Any, value: Tensor | None) -> None:
        if value is not None:
            self.__dict__["_logits"] = value

    def get(self: Any, key: Any) -> Any:
        return self.logits if key == "logits" else super(made, self).__getitem__(key)

    body = {"logits": property(logits, put), "__getitem__": get, "__module__": kind.__module__}
    made: Any = type(kind.__name__, (kind,), body)
    return made


class HeadHook:
    """A hook that does not tie the head to the wrapper: the head may be copied and pickled by itself."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine, self.name = weakref.ref(engine), name

    def __call__(self, module: nn.Module, args: tuple, *output: Any) -> Any:
        engine = self.engine()
        return None if engine is None else getattr(engine, self.name)(module, args, *output)

    def __deepcopy__(self, memo: dict) -> HeadHook:
        return self

    def __reduce__(self) -> Any:
        return _no_hook, ()


def _no_hook() -> Callable:
    return lambda *args: None
