"""What is merged into a layer of the base, and when a pass goes by it.

Merging changes how adapters are computed, never which of them act: a pass goes by the weight with the adapters in it only
while exactly that is what it asks for. Any other pass (other adapters, a mixed batch, none, another wrapper's, one that
trains) goes by the layer as it was, beside which the adapters that act are computed as ever.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..routing import Switch, active_adapters, active_routes


class Fold:
    """The adapters of one wrapper in a layer's weight. It hangs on that layer (see `fold_of`), for all wrappers to find.

    Args:
        plain: the layer as it was.
        switch: of the wrapper whose adapters they are.
        requantize: whether a quantised layer was quantised anew.
    """

    def __init__(self, plain: nn.Module, switch: Switch, requantize: bool) -> None:
        self.plain = plain
        self.switch = switch
        self.requantize = requantize
        self.trained = False  # a fused optimizer's steps leave no trace in a parameter's version
        self.parts: dict[str, tuple[nn.Module, list[nn.Parameter]]] = {}  # dropout and parameters by adapter
        self.stamps: dict[str, list[tuple[int, int]]] = {}

    def note(self, name: str, dropout: nn.Module, parameters: list[nn.Parameter]) -> None:
        """Adapter `name` is in the weight, with the values that its parameters have now."""
        self.parts[name] = dropout, parameters
        self.stamps[name] = _stamps(parameters)

    @property
    def fresh(self) -> bool:
        """Whether the adapters still have the values that are in the weight."""
        return not self.trained and all(_stamps(p) == self.stamps[n] for n, (_, p) in self.parts.items())

    def holds(self) -> bool:
        """Whether the pass that runs now goes by the weight with the adapters in it."""
        acting = () if active_routes(self.switch) is not None else active_adapters(self.switch)
        if not all(name in acting for name in self.parts):
            return False
        if torch.is_grad_enabled() and any(p.requires_grad for _, ps in self.parts.values() for p in ps):
            self.trained = self.trained or any(drop.training for drop, _ in self.parts.values())
            return False
        drops = any(drop.training and isinstance(drop, nn.Dropout) for drop, _ in self.parts.values())
        return not drops and self.fresh

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"stamps": self.fresh}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.stamps = {n: _stamps(p) if state["stamps"] else [] for n, (_, p) in self.parts.items()}


def _stamps(parameters: list[nn.Parameter]) -> list[tuple[int, int]]:
    """What changes with the parameters' values."""
    return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters]


def fold_of(layer: Any) -> Fold | None:
    """What is merged into a layer of the base."""
    return vars(layer).get("fold")


def as_it_was(layer: Any) -> Any:
    """A layer of the base before adapters were merged into it."""
    fold = fold_of(layer)
    return layer if fold is None else fold.plain.train(layer.training)


def with_weight(layer: nn.Module, weight: Tensor) -> nn.Module:
    """`layer` (hooks, bias and all) with another weight."""
    made = object.__new__(type(layer))
    made.__dict__.update(layer.__dict__)
    made.__dict__["_parameters"] = layer._parameters | {"weight": weight}
    if "forward" in layer.__dict__:  # bound to the layer itself: accelerate's hooks
        made.__dict__["forward"] = functools.partial(_holding, layer, weight)
    return made


def _holding(layer: nn.Module, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A layer's own forward while it holds another weight."""
    own = layer._parameters["weight"]
    layer._parameters["weight"] = weight  # type: ignore[assignment]
    try:
        return layer.forward(*args, **kwargs)
    finally:
        layer._parameters["weight"] = own


def both_forms(layer: nn.Module) -> list[nn.Module]:
    """A layer of the base, and where a quantised one was replaced by a merge, that one too: each has its own hooks."""
    plain = as_it_was(layer)
    return [layer] if plain._forward_hooks is layer._forward_hooks else [layer, plain]
