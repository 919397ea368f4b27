"""One layer of the base, as all wrappers over it share it: what it computes, and which adapters are folded into its weight.

Merging changes how adapters are computed, never which of them act: a pass goes by the weight with the adapters in it only
while exactly that is what it asks for. Any other pass (other adapters, a mixed batch, none, one that trains) goes by the
layer as it was, beside which the adapters that act are computed as ever.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedError
from ..quantization import dequantize, dequantized, quantized_kind, requantized
from ..routing import Switch, active_routes


class Owner(Protocol):
    """The module that holds adapters' tensors, as this file knows it (`Adapted`)."""

    switch: Switch
    changes: dict[str, Any]
    biases: dict[str, Tensor]
    training: bool

    @property
    def active_adapters(self) -> list[str]: ...

    def held(self, name: str) -> Any: ...

    def read(self, name: str) -> list[nn.Parameter]: ...

    def turn(self, name: str) -> int: ...


class Fold:
    """One adapter in a layer's weight, and the values that it had when it was put there.

    Args:
        owner: the module that holds the adapter's tensors.
        name: the adapter's.
    """

    def __init__(self, owner: Owner, name: str) -> None:
        self.owner = owner
        self.name = name
        self.note()

    def note(self) -> None:
        """The weight has the values that the adapter has now."""
        self.trained = False  # a fused optimizer's steps leave no trace in a parameter's version
        self.parameters = self.owner.read(self.name)
        self.stamps = _stamps(self.parameters)

    @property
    def fresh(self) -> bool:
        """Whether the adapter still has the values that are in the weight."""
        return not self.trained and _stamps(self.parameters) == self.stamps

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"stamps": self.fresh}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.stamps = _stamps(self.parameters) if state["stamps"] else []


def _stamps(parameters: list[nn.Parameter]) -> list[tuple[int, int]]:
    """What changes with the parameters' values."""
    return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters]


class Frozen:
    """A layer of the base. Weights are rows [out, in] here, whatever the layer's own layout is.

    Args:
        layer: the base's module.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer: Any = layer  # as it stands in the base: a merge puts a copy in a quantised one's place
        self.before: Any = None  # as it was, while adapters are folded in
        self.folds: list[Fold] = []
        self.over: list[Owner] = []  # the modules around it, one a wrapper, from the inside to the outside
        self.rebiased = False  # whether the folds change the bias
        self.requantize = False

    # -- what it computes ------------------------------------------------------------------------------------------------
    @property
    def plain(self) -> Any:
        """The layer before adapters were folded in."""
        return self.layer if self.before is None else self.before.train(self.layer.training)

    @property
    def kind(self) -> str:
        """ "linear" (torch's, quantised, Conv1D), "embedding", or the name of another class."""
        if isinstance(self.layer, nn.Embedding):
            return "embedding"
        return "linear" if isinstance(self.layer, (nn.Linear, Conv1D)) else type(self.layer).__name__

    @property
    def shape(self) -> tuple[int, int]:
        """Output and input width: hidden size and vocabulary of an embedding."""
        if isinstance(self.layer, nn.Linear):
            return self.layer.out_features, self.layer.in_features
        return tuple(reversed(self.layer.weight.shape))  # type: ignore[return-value]

    @property
    def quantized(self) -> str | None:
        """How it is quantised (see `quantization`), before adapters were folded in."""
        return quantized_kind(self.plain)

    @property
    def device(self) -> torch.device:
        return self.layer.weight.device

    @property
    def bias(self) -> Tensor | None:
        """[out], before adapters were folded in."""
        return getattr(self.plain, "bias", None)

    @property
    def scale(self) -> float | Tensor | None:
        """What an embedding multiplies its output by (Gemma, BART)."""
        return getattr(self.layer, "embed_scale", None)

    def rows(self, weight: Tensor) -> Tensor:
        """Between the layer's own layout and [out, in]; its own inverse."""
        return weight.T if isinstance(self.layer, (Conv1D, nn.Embedding)) else weight

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out, in] before adapters were folded in, dequantised, in at least fp32, or in `dtype`."""
        found = self.rows(dequantize(self.plain))
        return found.to(dtype or torch.promote_types(found.dtype, torch.float32))

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the layer would give of x by another weight [out, in], without bias."""
        if self.kind != "embedding":
            return F.linear(x.to(weight.dtype), weight)
        found = F.embedding(x, weight.T)
        return found if self.scale is None else found * self.scale

    # -- what is folded in -----------------------------------------------------------------------------------------------
    @property
    def fresh(self) -> bool:
        """Whether all that is folded in still has the values that are in the weight."""
        return all(fold.fresh for fold in self.folds)

    def named(self, owner: Owner) -> list[str]:
        """The adapters of one module that are folded in."""
        return [fold.name for fold in self.folds if fold.owner is owner]

    def stale(self) -> None:
        """The layer itself has changed: what is in the weight is no more what it should be."""
        for fold in self.folds:
            fold.trained = True

    def holds(self) -> bool:
        """Whether the pass that runs now goes by the weight with the folds in it.

        They must be those that act first (or all that act must be of the kind that adds, whose order does not matter), with
        the values that were folded, and without dropout or a gradient to take.
        """
        acting = []
        for owner in self.over:
            if active_routes(owner.switch) is not None:
                return False
            acting += [(owner, name) for name in owner.active_adapters]
        folded = [(fold.owner, fold.name) for fold in self.folds]
        if not all(any(f[0] is a[0] and f[1] == a[1] for a in acting) for f in folded):
            return False
        changes = [owner.changes[name] for owner, name in acting]
        first = all(f[0] is a[0] and f[1] == a[1] for f, a in zip(folded, acting, strict=False))
        if not first and not all(change.additive for change in changes):
            return False
        if self.rebiased and any(name in owner.biases for owner, name in acting):
            return False
        if torch.is_grad_enabled() and any(p.requires_grad for fold in self.folds for p in fold.parameters):
            for fold in self.folds:
                fold.trained = fold.trained or fold.owner.training
            return False
        return self.fresh and not any(owner.changes[name].drops(owner.held(name)) for owner, name in folded)

    def folded(self, parts: Iterable[tuple[Owner, str]]) -> tuple[Tensor, Tensor | None]:
        """The weight [out, in], in at least fp32, and the bias [out] with adapters in them, one after the other."""
        weight, bias = self.weight(), self.bias
        with torch.no_grad():
            for owner, name in parts:
                change, t = owner.changes[name], owner.held(name)
                weight, bias = change.fold(t, weight, self), change.bias(t, bias)
        return weight, bias

    def refold(self, parts: Sequence[tuple[Owner, str]]) -> None:
        """Put exactly these adapters into the weight; for none it is, bit for bit, what it was.

        A quantised layer is replaced by a bf16 copy, or with `requantize` by a quantised one: `layer` is then another
        module, which the caller puts in its place.
        """
        if not parts:
            self._restore()
            return
        order = {id(owner): place for place, owner in enumerate(self.over)}
        parts = sorted(parts, key=lambda part: (order[id(part[0])], part[0].turn(part[1])))
        weight, bias = self.folded(parts)
        plain, own = self.plain, self.bias
        if bias is not None and own is None:
            raise UnsupportedError(
                f"Impossible to merge an adapter with a bias of its own (lora_bias): this {type(self.layer).__name__} has "
                "none to merge it into. Keep it attached."
            )
        if self.quantized:
            made = requantized(plain, weight) if self.requantize else dequantized(plain, weight)
            self.before, self.layer = plain, made
        else:
            self.before = with_weight(self.layer, self.layer.weight) if self.before is None else self.before
            made = self.layer
            made.weight = nn.Parameter(self.rows(weight).to(plain.weight.dtype).contiguous(), requires_grad=False)
        self.rebiased = bias is not own
        if bias is not None and own is not None:
            made.bias = nn.Parameter(bias.detach().to(own.dtype, copy=True), requires_grad=False) if self.rebiased else own
        self.folds = [Fold(owner, name) for owner, name in parts]
        vars(self.layer)["folded"] = self

    def _restore(self) -> None:
        if self.before is None:
            return
        plain, bias = self.plain, self.bias
        vars(self.layer).pop("folded")
        if quantized_kind(plain) is not None:
            self.layer = plain
        else:
            self.layer.weight = plain.weight
            if bias is not None:
                self.layer.bias = bias
        self.before, self.folds = None, []

    def forget(self) -> None:
        """There is no way back: the weight as it is now is the base's."""
        if self.before is not None:
            vars(self.layer).pop("folded")
        self.before, self.folds = None, []


def frozen_of(layer: Any) -> Frozen | None:
    """What a layer of the base is by itself, while adapters are folded into it."""
    return vars(layer).get("folded")


def as_it_was(layer: Any) -> Any:
    """A layer of the base before adapters were folded into it."""
    frozen = frozen_of(layer)
    return layer if frozen is None else frozen.plain


def with_weight(layer: nn.Module, weight: Tensor, name: str = "weight") -> nn.Module:
    """`layer` (hooks, bias and all) with another weight, or another parameter of that name."""
    made = object.__new__(type(layer))
    made.__dict__.update(layer.__dict__)
    made.__dict__["_parameters"] = layer._parameters | {name: weight}
    if "forward" in layer.__dict__:  # bound to the layer itself: accelerate's hooks
        made.__dict__["forward"] = functools.partial(_holding, layer, made)
    return made


def _holding(layer: nn.Module, made: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A layer's own forward while it holds another's parameters."""
    own = layer._parameters
    layer.__dict__["_parameters"] = made._parameters
    try:
        return layer.forward(*args, **kwargs)
    finally:
        layer.__dict__["_parameters"] = own


def both_forms(layer: nn.Module) -> list[nn.Module]:
    """A layer of the base, and where a quantised one was replaced by a merge, that one too: each has its own hooks."""
    plain = as_it_was(layer)
    return [layer] if plain._forward_hooks is layer._forward_hooks else [layer, plain]
