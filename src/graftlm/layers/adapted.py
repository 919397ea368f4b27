"""A frozen layer with any number of adapters' changes beside it: `Adapted`, in the layer's place.

Parameter names are HF PEFT's (`base_layer.weight`, `lora_A.<adapter>.weight`, …). A base that is wrapped twice has one such
module in another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..architectures import base_modules
from ..errors import UnsupportedError
from ..kernels import Update, adapted_linear, grouped_low_rank
from ..routing import Routes, Switch, active_adapters, active_routes, planned_adapters
from .change import Change, Held, LowRank, add
from .frozen import Frozen, Owner, frozen_of
from .switched import Switched


class Adapted(Switched, nn.Module):
    """In place of a layer: the layer itself, `base_layer`, and the adapters' tensors in tables, by name.

    Args:
        base_layer: the module that stood here.
        switch: of the wrapper that put this in place; it says which adapters apply.
    """

    def __init__(self, base_layer: nn.Module, switch: Switch) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.switch = switch
        self.changes: dict[str, Change] = {}
        self.biases: dict[str, Tensor] = {}  # a trained one by its adapter (of a wrapper's, one can), which a hook adds
        self.frozen: Frozen = self._frozen(base_layer)
        self.frozen.over.append(self)
        self.train(base_layer.training)

    def _frozen(self, base_layer: nn.Module) -> Frozen:
        """What is changed here, as all wrappers over it share it."""
        return base_layer.frozen if isinstance(base_layer, Adapted) else frozen_of(base_layer) or Frozen(base_layer)

    # -- what others ask -------------------------------------------------------------------------------------------------
    @property
    def weight(self) -> Tensor:
        """The base weight (models look at `layer.weight.dtype` and `.device`)."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias  # type: ignore[return-value]

    def __getattr__(self, name: str) -> Any:
        """Of the layer; and of the adapters the numbers that HF PEFT has by name: `layer.scaling["default"]`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("__"):
                raise
            found = {n: getattr(c, name) for n, c in self.__dict__.get("changes", {}).items() if name in c.numbers}
            return MappingProxyType(found) if found else getattr(self.base_layer, name)

    @property
    def in_features(self) -> int:
        """Width of what the layer reads; a convolution's channels, an embedding's tokens."""
        return self.frozen.features[1]

    @property
    def out_features(self) -> int:
        return self.frozen.features[0]

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that act here now, in their order."""
        return [name for name in active_adapters(self.switch) if name in self.changes]

    @property
    def acts(self) -> bool:
        """Whether an adapter may act here now."""
        return active_routes(self.switch) is not None or bool(self.active_adapters)

    @property
    def merged_adapters(self) -> list[str]:
        return self.frozen.named(self)

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @property
    def token_adapter(self) -> Adapted:
        """Holds the rows of tokens that adapters train here (`trainable_tokens_delta`): of a tied layer, another one."""
        found = [c for c in self.changes.values() if hasattr(c, "originals")]
        if not found:
            raise AttributeError(f"No adapter trains tokens of this {type(self.frozen.layer).__name__}.")
        return found[0].home.layer if all(hasattr(c, "home") for c in found) else self  # type: ignore[attr-defined]

    @property
    def trainable_tokens_original(self) -> dict[str, Tensor]:
        """The base's rows [n, H] of the tokens that adapters train here."""
        return {n: c.originals(self.frozen) for n, c in self.changes.items() if hasattr(c, "originals")}

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    def held(self, name: str) -> Held:
        """The tensors of one adapter."""
        return Held(self, name)

    def parts(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of one adapter, with their names below this module."""
        for table, key, parameter in self.changes[name].parts(self.held(name)) if name in self.changes else ():
            yield f"{table}.{name}.{key}" if key else f"{table}.{name}", parameter

    def held_by(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, parameter) for name in self.changes for _, parameter in self.parts(name))

    def turn(self, name: str) -> int:
        """An adapter's place in the order in which adapters act."""
        active = self.switch.active
        return active.index(name) if name in active else len(active) + list(self.changes).index(name)

    # -- scales ----------------------------------------------------------------------------------------------------------
    def set_scale(self, adapter: str, scale: float) -> None:
        """Let an adapter act with `scale` times the scale that its rank and alpha give; nothing where it is not here."""
        if adapter in self.changes and "scaling" in self.changes[adapter].numbers:
            change: Any = self.changes[adapter]
            self._scaled(change, scale * change.initial_scaling(change.config))

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of all active adapters."""
        for change in self._scales():
            self._scaled(change, change.scaling * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of all active adapters; None takes it back to what rank and alpha give."""
        for change in self._scales():
            self._scaled(change, change.initial_scaling(change.config) if scale is None else change.scaling / scale)

    def _scales(self) -> list[Any]:
        return [self.changes[n] for n in self.active_adapters if "scaling" in self.changes[n].numbers]

    def _scaled(self, change: Any, scaling: Any) -> None:
        if isinstance(change.scaling, Tensor):
            change.scaling.fill_(scaling)
        else:
            change.scaling = scaling
        self.frozen.stale()  # what is merged has the old scale

    # -- adapters come and go --------------------------------------------------------------------------------------------
    def add(self, name: str, change: Change, dtype: torch.dtype, *, initialise: bool = True) -> None:
        """Put an adapter in; its tensors are of `dtype`."""
        self.changes[name] = change
        change.create(self.held(name), self.frozen, dtype, initialise)
        for table in change.tables:
            if isinstance(held := self._modules.get(table), nn.ModuleDict) and name in held:
                held[name].train(self.training)

    def remove(self, name: str) -> None:
        """Take an adapter out; a merged one is unmerged first."""
        self.unmerge(name)
        held = self.held(name)
        for table in self.changes.pop(name).tables:
            if table in held:
                del held[table]
        self.biases.pop(name, None)

    def leave_place(self) -> nn.Module:
        """The module that takes this one's place again, adapters and all merged away or removed."""
        if self in self.frozen.over:
            self.frozen.over.remove(self)
        return self.base_layer

    # -- merging ---------------------------------------------------------------------------------------------------------
    def get_delta_weight(self, name: str) -> Tensor:
        """What merging this adapter alone adds to the base weight, fp32, in the layer's own layout."""
        change, t, frozen = self.changes[name], self.held(name), self.frozen
        with torch.no_grad():
            weight = frozen.weight()
            added = change.update(t, weight.dtype) if change.additive else change.fold(t, weight, frozen) - weight
        return frozen.rows(added)

    def check_merge(self, names: Sequence[str]) -> None:
        """UnsupportedError where one of these adapters cannot be folded into this layer."""
        own = [name for name in names if name in self.changes]
        if own:
            self.frozen.check_merge()
        for name in own:
            self.changes[name].check_merge(self.held(name), self.frozen)

    def merge(
        self, names: Sequence[str] = (), *, requantize: bool = False, safe_merge: bool = False, adapter_names: Any = None
    ) -> None:
        """Fold adapters (the active ones) into the base weight beside what is in it; changed ones anew.

        A quantised layer is replaced by a bf16 copy, or with `requantize` by a quantised one (which rounds the update away
        in part). `safe_merge` (ValueError for a weight that is not finite) and `adapter_names`: HF PEFT's for one layer.
        """
        names = names or adapter_names or self.active_adapters
        if safe_merge and not self.finite(names):
            raise ValueError(f"Merging {', '.join(names)} gives NaN or infinite weights; nothing was changed.")
        if self.holds(names):
            return
        frozen = self.frozen
        new = [name for name in names if name in self.changes and name not in self.merged_adapters]
        if new:
            frozen.requantize = requantize
        self.refold([*((fold.owner, fold.name) for fold in frozen.folds), *((self, name) for name in new)])

    def holds(self, names: Sequence[str]) -> bool:
        """Whether those of these adapters that are here are merged, with the values that they have now."""
        return self.frozen.fresh and not self.changes.keys() & set(names) - set(self.merged_adapters)

    def unmerge(self, name: str | None = None) -> None:
        """Take an adapter, or all of this wrapper's, out of the base weight: bit for bit what it was where none is left."""
        folds = self.frozen.folds
        left = [(f.owner, f.name) for f in folds if f.owner is not self or (name is not None and f.name != name)]
        if len(left) < len(folds):
            self.refold(left)

    def refold(self, parts: Sequence[tuple[Owner, str]]) -> None:
        """`Frozen.refold`, and the layer that it makes in its place."""
        self.frozen.refold(parts)
        inner: Adapted = self
        while isinstance(inner.base_layer, Adapted):
            inner = inner.base_layer
        if inner.base_layer is not self.frozen.layer:
            inner.base_layer = self.frozen.layer

    def finite(self, names: Sequence[str]) -> bool:
        """Whether weight and bias with these adapters in them would hold finite numbers only."""
        folded = self.frozen.folded([(self, name) for name in names if name in self.changes])
        return all(bool(torch.isfinite(tensor).all()) for tensor in folded if tensor is not None)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves and casts: also of the weight as it was."""
        own = [fold for fold in self.frozen.folds if fold.owner is self]
        fresh = [fold for fold in own if fold.fresh]
        super()._apply(fn, recurse)
        if self.frozen.before is not None and self.frozen.over[0] is self:
            self.frozen.before._apply(fn)
        for fold in own:
            fold.find()
        for fold in fresh:
            fold.note()
        return self

    # -- running ---------------------------------------------------------------------------------------------------------
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in] (token ids [...] for an embedding) -> [..., out]."""
        layer, frozen, merged = self._modules["base_layer"], self.frozen, []
        if frozen.folds:
            if frozen.holds():
                merged = frozen.named(self)
            elif layer is frozen.layer:
                layer = frozen.plain
        routes = active_routes(self.switch)
        if routes is not None:
            return self._routed(routes, layer, x, args, kwargs)
        names = [name for name in active_adapters(self.switch) if name in self.changes and name not in merged]
        if not names:
            return layer(x, *args, **kwargs)  # type: ignore[misc]
        parts = [(self.changes[name], Held(self, name)) for name in names]
        if len(parts) == 1 and (low := parts[0][0].low_rank(parts[0][1])) is not None:  # plain LoRA: the shortest way
            made = None if args or kwargs or frozen.folds else self._at_once(layer, x, low)
            if made is not None:
                return made
            y = layer(x, *args, **kwargs)  # type: ignore[misc]
            return add(self._own(y) if self._watched(layer) or not y.is_contiguous() else y, x, low)
        inputs = self._enter(parts, x)
        y = layer(inputs.pop(0), *args, **kwargs)  # type: ignore[misc]
        return self._leave(parts, inputs, y, merged, self._watched(layer))

    def _at_once(self, layer: Any, x: Tensor, low: LowRank) -> Tensor | None:
        """The layer's own product and one update in one function, in training; None where they are to be made apart."""
        if not torch.is_grad_enabled():
            return None
        while isinstance(layer, Adapted) and untouched(layer) and not layer.acts:  # another wrapper's
            layer = layer.base_layer
        kind = getattr(type(layer), "plain_class", type(layer))
        if kind not in (nn.Linear, Conv1D) or not untouched(layer):
            return None
        return adapted_linear(x, self.frozen.rows(layer.weight), layer.bias, *low)

    def _routed(self, routes: Routes, layer: Any, x: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """A mixed batch: each group's changes to its rows. Plain low-rank ones go all through one function (see
        `kernels.lora`), the others group by group."""
        groups = [[(self.changes[n], Held(self, n)) for n in group if n in self.changes] for group in routes.groups]
        if not any(groups):
            return layer(x, *args, **kwargs)
        if self.frozen.kind == "conv" and x.dim() < self.weight.dim():
            raise UnsupportedError(
                f"A {type(self.frozen.layer).__name__} with adapters gets an input of shape {tuple(x.shape)}, without rows, "
                "in a batch of rows of different adapters. Run one adapter a batch on this model."
            )
        inputs: dict[int, list[Tensor]] = {}
        given = x
        for i, parts in enumerate(groups):
            if any(change.enters for change, _ in parts):
                index = routes.parts(x)[i][1]
                with routes.drawing(i):
                    first, *inputs[i] = self._enter(parts, x[index])
                given = x.clone() if given is x else given
                given[index] = first
        y = layer(given, *args, **kwargs)
        made, seen, updates = y, self._watched(layer), []
        for i, (parts, (_, index)) in enumerate(zip(groups, routes.parts(y), strict=True)):
            if not parts:
                continue
            if (lows := self._low_ranks(parts)) is not None:
                updates += [Update(index, *low, partial(routes.drawing, i)) for low in lows]
                continue
            with routes.drawing(i):
                part = self._leave(parts, inputs.get(i) or [x[index]] * len(parts), y[index], [], True)
            made = y.clone() if made is y else made
            made[index] = part
        if not updates:
            return made
        return grouped_low_rank(self._own(y) if made is y and seen else made, x, updates, routes.kept_for(self))

    def _low_ranks(self, parts: list[tuple[Change, Held]]) -> list[LowRank] | None:
        """A group's changes as low-rank updates; None where one is more than that, or drops something without gradients."""
        lows = [change.low_rank(t) for change, t in parts]
        if any(low is None or (low.p and not torch.is_grad_enabled()) for low in lows):
            return None
        return lows  # type: ignore[return-value]

    @staticmethod
    def _enter(parts: list[tuple[Change, Held]], x: Tensor) -> list[Tensor]:
        """What the layer reads, and what comes to each change, from the first to the last."""
        inputs = [x]
        for change, t in reversed(parts):
            inputs.insert(0, change.enter(t, inputs[0]) if change.enters else inputs[0])
        return inputs

    def _leave(
        self, parts: list[tuple[Change, Held]], inputs: list[Tensor], y: Tensor, merged: list[str], seen: bool
    ) -> Tensor:
        """The layer's output y [..., out] as changes leave it, from the first to the last.

        Args:
            inputs: what came to each, [..., in].
            merged: the adapters that are in y already.
            seen: whether somebody else may hold y, which must then stay as it is.
        """
        lows = [change.low_rank(t) for change, t in parts]
        bias = None if all(lows) else self._bias([t.name for _, t in parts], merged)
        made = y
        for (change, t), x, low in zip(parts, inputs, lows, strict=True):
            if low is None:
                made = change.leave(t, x, made, bias, self.frozen)
                bias = change.bias(t, bias)
                continue
            made = add(self._own(y) if made is y and (seen or not y.is_contiguous()) else made, x, low)
        return made

    @staticmethod
    def _own(y: Tensor) -> Tensor:
        """y in memory of its own, which may be written into."""
        return y.clone(memory_format=torch.contiguous_format)

    def _bias(self, names: list[str], merged: list[str]) -> Tensor | None:
        """The bias [out] in the layer's output before these adapters leave their traces in it."""
        inner = self._modules["base_layer"]
        bias = inner._bias_after() if isinstance(inner, Adapted) else self.frozen.bias
        planned = planned_adapters(self.switch)
        bias = next((self.biases[n] for n in (*merged, *names) if n in self.biases and n in planned), bias)
        for name in merged:
            bias = self.changes[name].bias(self.held(name), bias)
        return bias

    def _bias_after(self) -> Tensor | None:
        """The bias in this module's output."""
        active = self.active_adapters if active_routes(self.switch) is None else []
        return self._bias(active, active)

    def _watched(self, layer: Any) -> bool:
        """Whether somebody's hook has seen the layer's output."""
        seen = layer._forward_hooks or self.frozen.layer._forward_hooks
        return bool(seen or torch.nn.modules.module._global_forward_hooks)


def untouched(layer: nn.Module) -> bool:
    """Whether nobody has a hook on a module, or has exchanged its forward."""
    own = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    everyones = vars(nn.modules.module)
    return "forward" not in layer.__dict__ and not any(layer.__dict__[n] or everyones[f"_global{n}"] for n in own)


def adapted_layers(base: nn.Module, switch: Switch) -> Iterator[tuple[str, Adapted]]:
    """The modules that hold a wrapper's adapters of layers, with their dotted names in the base as it stands."""
    for path, module in base_modules(base):
        if isinstance(module, Adapted) and module.switch is switch:
            yield path, module
