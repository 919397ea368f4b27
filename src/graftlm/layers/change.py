"""What an adapter does to one layer of the base: `Change`, which a method defines.

    x ──enter──→ the layer, W x + b ──leave──→ y            the same as a weight: fold(W) x + bias(b)

Shapes: x [..., in] (token ids [...] of an embedding); y [..., out]; weights are rows [out, in], whatever the layer's layout.

Several changes of one layer nest: they enter from the last to the first, leave and are folded from the first to the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import Update, dropout, grouped_low_rank, low_rank
from .frozen import Frozen


class LowRank(NamedTuple):
    """An update ``scale * B A dropout(x)``: A [r, in], B [out, r], p the probability of dropping an element of x now."""

    a: Tensor
    b: Tensor
    scale: float
    p: float = 0.0


class Held:
    """One adapter's tensors in a layer, by table: `t["lora_A"]` is a parameter or a module. Looked up at each call, because
    torch exchanges parameters when a model is moved."""

    __slots__ = ("layer", "name")

    def __init__(self, layer: Any, name: str) -> None:
        self.layer = layer
        self.name = name

    def __getitem__(self, table: str) -> Any:
        return self.layer._modules[table][self.name]

    def __setitem__(self, table: str, value: nn.Module | nn.Parameter) -> None:
        if table not in self.layer._modules:
            kind = nn.ParameterDict if isinstance(value, nn.Parameter) else nn.ModuleDict
            setattr(self.layer, table, kind())
        self.layer._modules[table][self.name] = value

    def __contains__(self, table: str) -> bool:
        return self.name in self.layer._modules.get(table, ())

    def __delitem__(self, table: str) -> None:
        held = self.layer._modules[table]
        del held[self.name]
        if not len(held):
            delattr(self.layer, table)


class Change:
    """What one adapter does to one layer. It holds numbers only; the tensors, `t`, are the layer's (see `Held`).

    A subclass has `create`, and either `low_rank`, or `update`, or what it needs of `enter`, `leave`, `fold` and `bias`:
    `fold` and `bias` then say as a weight what the others do to x and y.
    """

    #: the tables that its tensors stand in, by HF PEFT's names
    tables: ClassVar[tuple[str, ...]] = ()
    #: of these, tables of modules whose parameter HF PEFT's files name by the table alone
    bare: ClassVar[frozenset[str]] = frozenset()
    #: tables that HF PEFT's files name otherwise
    files: Mapping[str, str] = MappingProxyType({})
    #: its numbers that HF PEFT's layers have by adapter
    numbers: ClassVar[tuple[str, ...]] = ()

    def create(self, t: Held, frozen: Frozen, dtype: torch.dtype, initialise: bool) -> None:
        """Make the tensors, on the layer's device; without `initialise` their values do not matter."""
        raise NotImplementedError

    def enter(self, t: Held, x: Tensor) -> Tensor:
        """What the layer reads in x's place."""
        return x

    def low_rank(self, t: Held) -> LowRank | None:
        """The change where that is all it does now: then it is computed together with others'."""
        return None

    def leave(self, t: Held, x: Tensor, y: Tensor, bias: Tensor | None, frozen: Frozen) -> Tensor:
        """What the layer's output becomes.

        Args:
            x: what came to this change, before it entered.
            y: the output so far, which may not be written into.
            bias: [out], the bias that y has by now.
        """
        if (low := self.low_rank(t)) is not None:
            return outside(y, x, low)
        return y + frozen.product(x, self.update(t, self.dtype(t))).to(y.dtype)

    def update(self, t: Held, dtype: torch.dtype) -> Tensor:
        """What is added to the weight [out, in], computed in `dtype`."""
        if (low := self.low_rank(t)) is None:
            raise NotImplementedError
        return low.scale * (low.b.to(dtype) @ low.a.to(dtype))

    def fold(self, t: Held, weight: Tensor, frozen: Frozen) -> Tensor:
        """The weight [out, in] with the change in it."""
        return weight + self.update(t, weight.dtype)

    def bias(self, t: Held, bias: Tensor | None) -> Tensor | None:
        """The bias [out] with the change in it."""
        return bias

    def check_merge(self, t: Held, frozen: Frozen) -> None:
        """UnsupportedError where the change of this layer is none of its weight."""

    @property
    def enters(self) -> bool:
        """Whether it changes what the layer reads."""
        return type(self).enter is not Change.enter

    @property
    def additive(self) -> bool:
        """Whether it only adds to the weight, so that its place among others does not matter."""
        return not self.enters and type(self).fold is Change.fold and type(self).bias is Change.bias

    def parts(self, t: Held) -> Iterator[tuple[str, str, nn.Parameter]]:
        """Its parameters: the table, the name within the adapter's module there ("" for a parameter itself), the value."""
        for table in self.tables:
            if table not in t:
                continue
            if isinstance(held := t[table], nn.Parameter):
                yield table, "", held
            else:
                yield from ((table, key, parameter) for key, parameter in held.named_parameters())

    def values(self, t: Held) -> list[nn.Parameter]:
        """What it is computed from: its own parameters, or those that another layer holds for both."""
        return [parameter for _, _, parameter in self.parts(t)]

    def refuse_beside(self, other: Change) -> None:
        """CompositionError where it cannot act together with another adapter's change of the same layer."""

    def dtype(self, t: Held) -> torch.dtype:
        """That of its tensors."""
        return next(parameter.dtype for _, _, parameter in self.parts(t))

    def drops(self, t: Held) -> bool:
        """Whether it draws dropout now."""
        held = (t[table] for table in self.tables if table in t)
        return any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in held)


def add(y: Tensor, x: Tensor, low: LowRank) -> Tensor:
    """`y` with a low-rank update by one function, written into y where that can be; in training its products are made in the
    activations' dtype."""
    if torch.is_grad_enabled():
        return low_rank(y, x, *low)
    if low.p or torch.compiler.is_compiling():
        return outside(y, x, low)
    return grouped_low_rank(y, x, [Update(slice(None), *low)], {})


def outside(y: Tensor, x: Tensor, low: LowRank) -> Tensor:
    """The same in plain steps, in the adapter's dtype; y stays as it is."""
    dropped = dropout(x.to(low.a.dtype), low.p)
    return y + (F.linear(F.linear(dropped, low.a), low.b) * low.scale).to(y.dtype)
