"""Outputs whose logits are made only if they are read, and hooks that do not tie a module to its wrapper."""

from __future__ import annotations

import functools
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
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
    """`output` (a transformers ModelOutput) with `loss`, and `logits` that are made by `make` when they are read."""
    kind = _lazy_class(type(output))  # type: ignore[arg-type]
    loss.logits_on_demand = OnDemand(make)  # type: ignore[attr-defined]
    items = {k: v for k, v in output.items() if k not in ("logits", "loss")}
    return kind(loss=loss, **items)


def add_to_loss(output: Any, penalty: Tensor | None) -> None:
    """Add a penalty to an output's loss, if there is one."""
    if penalty is None:
        return
    loss = output.loss + penalty.to(output.loss.device)
    if (made := getattr(output.loss, "logits_on_demand", None)) is not None:
        loss.logits_on_demand = made
    output.loss = loss


# Libraries that go through all items of an output in every training step: to them the logits are no item, or they would be
# made each time. accelerate builds outputs anew from what it finds.
_PASSING = ("accelerate.", "torch.nn.parallel.")


@functools.cache
def _lazy_class(kind: Any) -> Any:
    """A subclass of an output class in which `logits` stand behind the loss as ever, made when they are first read."""

    def logits(self: Any) -> Tensor:
        if "_logits" not in self.__dict__:
            self.__dict__["_logits"] = self.loss.logits_on_demand()
        return self.__dict__["_logits"]

    def put(self: Any, value: Tensor | None) -> None:
        if value is not None:
            self.__dict__["_logits"] = value

    def names(self: Any) -> Iterator[str]:
        held = list(OrderedDict.__iter__(self))
        yield from held if "logits" in held else [*held[:1], "logits", *held[1:]]  # they are held once they were set

    def get(self: Any, key: Any) -> Any:
        if key == "logits":
            return self.logits
        if isinstance(key, str):
            return OrderedDict.__getitem__(self, key)
        keys = list(self)[key]
        return self[keys] if isinstance(keys, str) else tuple(self[k] for k in keys)

    def view(made: Callable, held: Callable) -> Callable:
        def of(self: Any) -> Any:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            return held(self) if caller.startswith(_PASSING) else made(self)

        return of

    def reduce(self: Any) -> Any:
        return kind, (), None, None, iter({**self, "logits": self.logits.detach()}.items())

    body = {
        "logits": property(logits, put),
        "__module__": kind.__module__,
        "__reduce__": reduce,
        "__iter__": names,
        "__len__": lambda self: sum(1 for _ in names(self)),
        "__contains__": lambda self, key: key == "logits" or OrderedDict.__contains__(self, key),
        "__getitem__": get,
        "get": Mapping.get,
        "to_tuple": lambda self: self[:],
        "keys": lambda self: KeysView(self),
        "values": view(ValuesView, OrderedDict.values),
        "items": view(ItemsView, OrderedDict.items),
    }
    return type(kind.__name__, (kind,), body)


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
