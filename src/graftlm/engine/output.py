"""Outputs whose logits are made only if they are read, and hooks that do not tie a module to its wrapper."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class OnDemand:
    """What makes a pass's logits. It travels with the loss, because accelerate builds outputs anew from their items; what is
    pickled or copied leaves it behind."""

    def __init__(self, make: Callable[[], Tensor] | None) -> None:
        self.make = make

    def __call__(self) -> Tensor:
        if self.make is None:
            raise AttributeError("This output was copied or unpickled, without what its logits are made of.")
        return self.make()

    def __reduce__(self) -> Any:
        return OnDemand, (None,)


def with_lazy_logits(output: Any, loss: Tensor, make: Callable[[], Tensor]) -> Any:
    """`output` (a transformers ModelOutput) with `loss`; its `logits` are no item, and made by `make` when they are read."""
    kind = _lazy_class(type(output))  # type: ignore[arg-type]
    loss.logits_on_demand = OnDemand(make)  # type: ignore[attr-defined]
    items = {k: v for k, v in output.items() if k not in ("logits", "loss")}
    return kind(loss=loss, **items)


@functools.cache
def _lazy_class(kind: Any) -> Any:
    """A subclass of an output class whose `logits` are made when they are first read, by name or by place."""

    def logits(self: Any) -> Tensor:
        if "_logits" not in self.__dict__:
            self.__dict__["_logits"] = self.loss.logits_on_demand()
        return self.__dict__["_logits"]

    def put(self: Any, value: Tensor | None) -> None:
        if value is not None:
            self.__dict__["_logits"] = value

    def get(self: Any, key: Any) -> Any:
        if key == "logits":
            return self.logits
        if isinstance(key, str):
            return super(made, self).__getitem__(key)
        return self.loss if key == 0 else self.to_tuple()[key]

    def get_or(self: Any, key: Any, default: Any = None) -> Any:
        return self.logits if key == "logits" else kind.get(self, key, default)

    def to_tuple(self: Any) -> tuple:
        rest = (super(made, self).__getitem__(k) for k in self.keys() if k != "loss")
        return (self.loss, self.logits, *rest)

    def reduce(self: Any) -> Any:
        return kind, (), None, None, iter({**self, "logits": self.logits.detach()}.items())

    body = {
        "logits": property(logits, put), "__getitem__": get, "get": get_or, "to_tuple": to_tuple, "__reduce__": reduce,
        "__module__": kind.__module__,
    }  # fmt: skip
    made: Any = type(kind.__name__, (kind,), body)
    return made


class Hook:
    """A hook on a module of the base that knows its owner weakly: the module may be copied and pickled by itself."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = weakref.ref(owner), name

    def __call__(self, module: nn.Module, args: tuple, *rest: Any) -> Any:
        owner = self.owner()
        return None if owner is None else getattr(owner, self.name)(module, args, *rest)

    def __deepcopy__(self, memo: dict) -> Hook:
        return self

    def __reduce__(self) -> Any:
        return _no_hook, ()


def _nothing(*args: Any) -> None:
    return None


def _no_hook() -> Callable:
    return _nothing
