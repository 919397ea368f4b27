"""One parameter of a module that is no layer by itself (experts stacked in one tensor), with adapters' changes beside it.

    AdaptedParameter("down_proj") ─ base_layer → AdaptedParameter("gate_up_proj") ─ base_layer → the module

The module computes as ever, on changed parameters: a pass runs a copy of it that holds them. Of several parameters of one
module each has its own `AdaptedParameter`, one around the other; the outermost runs the pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..routing import Plan, Switch, current_scope, running
from .adapted import Adapted
from .frozen import Fold, Frozen, Owner, with_parameters


class FrozenParameter(Frozen):
    """One parameter of a module of the base. Weights here are in the parameter's own layout, whatever it is.

    Args:
        layer: the base's module.
        name: the parameter's.
    """

    quantized = None  # type: ignore[assignment]
    bias = None  # type: ignore[assignment]
    scale = None  # type: ignore[assignment]

    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__(layer)
        self.kind = "parameter"
        self.name = name

    @property
    def names(self) -> tuple[str, str]:
        return self.name, "bias"

    @property
    def original(self) -> nn.Parameter:
        """The parameter before adapters were folded in."""
        return self.layer._parameters[self.name] if self.before is None else self.before[self.name]

    @property
    def plain(self) -> Any:
        return self.layer if self.before is None else with_parameters(self.layer, {self.name: self.original})

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.original.shape)

    @property
    def device(self) -> torch.device:
        return self.original.device

    def rows(self, weight: Tensor) -> Tensor:
        return weight

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        found = self.original
        return found.to(dtype or torch.promote_types(found.dtype, torch.float32))

    def now(self) -> Tensor | None:
        """The parameter's value in the pass that runs now; None for what the module holds."""
        acting = [(owner, name) for owner in self.over for name in owner.active_adapters]
        value, folded = self.original, []
        if self.folds and self.holds():
            value, folded = self.layer._parameters[self.name], [(fold.owner, fold.name) for fold in self.folds]
        for owner, name in acting:
            if not any(owner is o and name == n for o, n in folded):
                value = owner.changes[name].fold(owner.held(name), value, self)
        return None if value is self.layer._parameters[self.name] else value

    def refold(self, parts: Sequence[tuple[Owner, str]]) -> None:
        original = self.original
        if not parts:
            self.layer._parameters[self.name] = original
            self.forget()
            return
        order = {id(owner): place for place, owner in enumerate(self.over)}
        weight, _ = self.folded(sorted(parts, key=lambda part: (order[id(part[0])], part[0].turn(part[1]))))
        self.before = nn.ParameterDict({self.name: original})
        self.layer._parameters[self.name] = nn.Parameter(weight.to(original.dtype), requires_grad=False)
        self.folds = [Fold(owner, name) for owner, name in parts]

    def forget(self) -> None:
        self.before, self.folds = None, []


class AdaptedParameter(Adapted):
    """In place of a module one of whose parameters adapters change.

    Args:
        base_layer: the module, or what stands in its place already.
        switch: of the wrapper that put this in place.
        parameter_name: the parameter's name in the module.
    """

    frozen: FrozenParameter

    def __init__(self, base_layer: nn.Module, switch: Switch, parameter_name: str) -> None:
        self.__dict__["parameter_name"] = parameter_name
        super().__init__(base_layer, switch)

    def _frozen(self, base_layer: nn.Module) -> FrozenParameter:
        found = [part.frozen for part in parameters_of(base_layer) if part.parameter_name == self.parameter_name]
        return found[0] if found else FrozenParameter(module_of(base_layer), self.parameter_name)

    @property
    def place(self) -> int:
        """Where the parameter comes among its module's: the later ones are around the earlier ones in HF PEFT's files."""
        return list(self.frozen.layer._parameters).index(self.parameter_name)

    def refold(self, parts: Sequence[tuple[Owner, str]]) -> None:
        self.frozen.refold(parts)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives; in a mixed batch, of each group's tokens by themselves."""
        scope = current_scope()
        if scope is None or scope.routes is None:
            return self._run(args, kwargs)
        given = [*args, *kwargs.values()]
        x = next(a for a in given if isinstance(a, Tensor))
        made: Tensor | None = None
        routes = scope.routes
        for i, (group, index) in enumerate(routes.parts(x)):
            switch = scope.plan.switch if routes.switches is None else routes.switches[i]
            own = [_part(a, x, index) for a in given]
            with running(Plan(switch, group)), routes.drawing(i):
                part = self._run(own[: len(args)], dict(zip(kwargs, own[len(args) :], strict=True)))
            if not isinstance(part, Tensor):
                raise UnsupportedError(
                    f"{type(self.frozen.layer).__name__} has target_parameters and gives more than one tensor; it does not "
                    "go into a batch of different adapters. Run one adapter a batch."
                )
            made = part.new_zeros(*x.shape[: part.dim() - 1], part.shape[-1]) if made is None else made
            made[index] = part
        return made

    def _run(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        module: Any = self.frozen.layer
        for frozen in dict.fromkeys(part.frozen for part in parameters_of(self)):
            if (value := frozen.now()) is not None:
                module = with_parameters(module, {frozen.name: value})
        return module(*args, **kwargs)


def _part(value: Any, x: Tensor, index: Any) -> Any:
    """A group's part of an argument that has an entry for each token of x; another one as it is."""
    if not isinstance(value, Tensor) or not value.dim():
        return value
    if value.shape[0] != x.shape[0]:
        raise UnsupportedError(
            f"A module with target_parameters gets inputs of shapes {tuple(x.shape)} and {tuple(value.shape)} in a batch of "
            "different adapters; their rows cannot be told apart. Run one adapter a batch on this model."
        )
    return value[index]


def parameters_of(module: nn.Module) -> list[AdaptedParameter]:
    """Those that stand around a module, from the outside to the inside."""
    found = []
    while isinstance(module, AdaptedParameter):
        found.append(module)
        module = module.base_layer
    return found


def module_of(module: nn.Module) -> nn.Module:
    """The module inside of them."""
    while isinstance(module, AdaptedParameter):
        module = module.base_layer
    return module
