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

#: the kinds of layers that a change can be of, and their modules
KINDS: dict[str, tuple[type, ...]] = {
    "embedding": (nn.Embedding,),
    "linear": (nn.Linear, Conv1D),
    "conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    "attention": (nn.MultiheadAttention,),
}


class Owner(Protocol):
    """The module that holds adapters' tensors, as this file knows it (`Adapted`)."""

    switch: Switch
    changes: dict[str, Any]
    biases: dict[str, Tensor]
    training: bool

    @property
    def active_adapters(self) -> list[str]: ...

    def held(self, name: str) -> Any: ...

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
        self.find()
        self.stamps = _stamps(self.parameters)

    def find(self) -> None:
        """The adapter's parameters as they are now: torch exchanges them when a model is moved."""
        self.parameters = self.owner.changes[self.name].values(self.owner.held(self.name))

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
    """What changes with the parameters' values, unless they are written through `.data`, which torch does not count."""
    return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters]


class Frozen:
    """A layer of the base. Weights are rows [out, in] here, whatever the layer's own layout is.

    Args:
        layer: the base's module.

    Attributes:
        kind: "linear" (torch's, quantised, Conv1D), "embedding", "conv" (torch's Conv1d, 2d and 3d), "attention" (the
            `in_proj_weight` of torch's MultiheadAttention), or the name of another class.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer: Any = layer  # as it stands in the base: a merge puts a copy in a quantised one's place
        self.kind = next((kind for kind, classes in KINDS.items() if isinstance(layer, classes)), type(layer).__name__)
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
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the weight: output and input width; hidden size and vocabulary of an embedding; of a
        convolution output channels, and input channels of a group times the kernel's size."""
        if isinstance(self.layer, nn.Linear):
            return self.layer.out_features, self.layer.in_features
        weight = getattr(self.layer, self.names[0])
        if self.kind in ("conv", "attention"):
            return weight.shape[0], weight[0].numel()
        return tuple(reversed(weight.shape))  # type: ignore[return-value]

    @property
    def features(self) -> tuple[int, int]:
        """Width of what the layer gives and of what it reads: channels of a convolution, else `shape`."""
        return (self.layer.out_channels, self.layer.in_channels) if self.kind == "conv" else self.shape

    @property
    def names(self) -> tuple[str, str]:
        """What the layer calls its weight and its bias."""
        return ("in_proj_weight", "in_proj_bias") if self.kind == "attention" else ("weight", "bias")

    @property
    def quantized(self) -> str | None:
        """How it is quantised (see `quantization`), before adapters were folded in."""
        return quantized_kind(self.plain)

    @property
    def device(self) -> torch.device:
        return getattr(self.layer, self.names[0]).device

    @property
    def bias(self) -> Tensor | None:
        """[out], before adapters were folded in."""
        return getattr(self.plain, self.names[1], None)

    @property
    def scale(self) -> float | Tensor | None:
        """What an embedding multiplies its output by (Gemma, BART)."""
        return getattr(self.layer, "embed_scale", None)

    def rows(self, weight: Tensor) -> Tensor:
        """Between the layer's own layout and [out, in]; its own inverse."""
        if self.kind == "conv":
            return weight.flatten(1) if weight.dim() > 2 else weight.reshape(self.layer.weight.shape)
        return weight.T if isinstance(self.layer, (Conv1D, nn.Embedding)) else weight

    def along(self, vector: Tensor) -> Tensor:
        """A vector of features, in any shape, so that it goes with what the layer reads or gives: x [..., n], of a
        convolution [..., n, *places]."""
        return vector.reshape(-1, *[1] * (self.layer.weight.dim() - 2)) if self.kind == "conv" else vector.flatten()

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out, in] before adapters were folded in, dequantised, in at least fp32, or in `dtype`."""
        found = self.rows(self.plain.in_proj_weight if self.kind == "attention" else dequantize(self.plain))
        return found.to(dtype or torch.promote_types(found.dtype, torch.float32))

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the layer would give of x by another weight [out, in], without bias."""
        if self.kind == "conv":
            return self.layer._conv_forward(x.to(weight.dtype), self.rows(weight), None)
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
        if any(active_routes(owner.switch) is not None for owner in self.over):
            return False
        acting = self.acting()
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

    def folded(self, parts: Iterable[tuple[Owner, str]], gradients: bool = False) -> tuple[Tensor, Tensor | None]:
        """The weight [out, in], in at least fp32, and the bias [out] with adapters in them, one after the other."""
        weight, bias = self.weight(), self.bias
        with torch.set_grad_enabled(gradients and torch.is_grad_enabled()):
            for owner, name in parts:
                change, t = owner.changes[name], owner.held(name)
                weight, bias = change.fold(t, weight, self), change.bias(t, bias)
        return weight, bias

    def acting(self) -> list[tuple[Owner, str]]:
        """The adapters that act on this layer now, of all wrappers, from the first to the last."""
        return [(owner, name) for owner in self.over for name in owner.active_adapters]

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
        name, bias_name = self.names
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
            made, before = self.layer, getattr(plain, name)
            self.before = with_parameters(self.layer, {name: before}) if self.before is None else self.before
            setattr(made, name, frozen_parameter(self.rows(weight).to(before.dtype).contiguous()))
        self.rebiased = bias is not own
        if bias is not None and own is not None:
            setattr(made, bias_name, frozen_parameter(bias.detach().to(own.dtype, copy=True)) if self.rebiased else own)
        self.folds = [Fold(owner, name) for owner, name in parts]
        vars(self.layer)["folded"] = self

    def check_merge(self) -> None:
        """UnsupportedError where the weight is computed from others at each pass (weight norm, a parametrisation)."""
        if self.names[0] not in self.layer._parameters:
            raise UnsupportedError(
                f"A {type(self.layer).__name__} with adapters computes its weight at each pass (weight norm, or another "
                "parametrisation), so nothing can be merged into it. Remove the parametrisation first "
                "(torch.nn.utils.parametrize.remove_parametrizations), or keep the adapter attached."
            )

    def _restore(self) -> None:
        if self.before is None:
            return
        plain, bias = self.plain, self.bias
        name, bias_name = self.names
        vars(self.layer).pop("folded")
        if quantized_kind(plain) is not None:
            self.layer = plain
        else:
            setattr(self.layer, name, getattr(plain, name))
            if bias is not None:
                setattr(self.layer, bias_name, bias)
        self.before, self.folds = None, []

    def forget(self) -> None:
        """There is no way back: the weight as it is now is the base's."""
        if self.before is not None:
            vars(self.layer).pop("folded")
        self.before, self.folds = None, []


_PRODUCTS: dict[tuple[type, str], bool] = {}


def is_product(layer: Any) -> bool:
    """Whether a linear layer computes ``x W^T + b`` [..., in] -> [..., out], or something of that shape: classes of their
    own need not (Llama 4's router gives two tensors, DeepSeek-V4's grouped layers read groups). They are asked once."""
    kind = type(layer)
    if kind.forward in (nn.Linear.forward, Conv1D.forward) or quantized_kind(layer) is not None:
        return True
    weight = layer.weight
    if (key := (kind, weight.device.type)) not in _PRODUCTS:
        width, out = (weight.shape if isinstance(layer, Conv1D) else weight.shape[::-1])[-2:]
        made: Any = None
        try:
            with torch.no_grad():
                made = kind.forward(layer, torch.zeros(1, 2, width, dtype=weight.dtype, device=weight.device))
        except TypeError:  # it reads more than x; what it gives shows when it runs
            return True
        except (RuntimeError, ValueError, LookupError):
            pass
        _PRODUCTS[key] = isinstance(made, Tensor) and made.shape == (1, 2, out)
    return _PRODUCTS[key]


def frozen_of(layer: Any) -> Frozen | None:
    """What a layer of the base is by itself, while adapters are folded into it."""
    return vars(layer).get("folded")


def as_it_was(layer: Any) -> Any:
    """A layer of the base before adapters were folded into it."""
    frozen = frozen_of(layer)
    return layer if frozen is None else frozen.plain


def frozen_parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def with_parameters(layer: nn.Module, values: dict[str, Any], modules: dict[str, Any] | None = None) -> nn.Module:
    """`layer` (hooks and all) with other values of some parameters, which may carry gradients, and of some modules in it."""
    made = object.__new__(type(layer))
    made.__dict__.update(layer.__dict__)
    made.__dict__["_parameters"] = layer._parameters | values
    made.__dict__["_modules"] = layer._modules | (modules or {})
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
