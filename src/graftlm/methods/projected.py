"""What methods with frozen random projections share (VeRA, RandLoRA): one pair A, B for all layers of an adapter.

The pair stands beside the base, in `base_model.<table>.<adapter>`, so that it is there once, moves with the model, and
has HF PEFT's names; a layer reads the part of it that its shape asks for. It is made from a seed, `projection_prng_key`,
and is in the adapter's file unless `save_projection=False`: then loading makes it anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..layers import Change, Frozen, Held, LowRank
from ..layers.change import outside
from .base import Site
from .fields import Count
from .layered import LayerConfig, LayerMethod


@dataclass(kw_only=True)
class ProjectedConfig(LayerConfig):
    """Fields of both methods.

    Args:
        projection_prng_key: seed of the projections.
        save_projection: whether they are in the adapter's file; else they are made anew from the seed.
        fan_in_fan_out: accepted for HF PEFT's sake; the layout is read from the module.
        bias: must be "none".
        init_weights: start without an effect; False starts at random.
        layers_to_transform, layers_pattern: only layers with these numbers (in a module list of that name).
    """

    projection_prng_key: int = 0
    save_projection: bool = True
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    own_fields: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})
    neutral_fields: ClassVar[frozenset[str]] = frozenset({"save_projection"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bias != "none":
            raise UnsupportedError(f"bias={self.bias!r}: biases are trained beside LoRA only; use 'none'.")


class Projections(nn.Module):
    """Frozen tensors by adapter."""

    def put(self, name: str, value: Tensor, persistent: bool) -> None:
        self.register_buffer(name, value, persistent=persistent)

    def __getitem__(self, name: str) -> Tensor:
        return self._buffers[name]  # type: ignore[return-value]


class ProjectedChange(Change):
    """Of a linear layer. A subclass has `factors`.

    Args:
        pair: where the projections are.
        frozen: the layer.
    """

    scaling = 1.0
    dropout: ClassVar[str]  # the table of its dropout

    def __init__(self, pair: tuple[Projections, Projections], frozen: Frozen, r: Count, p: float) -> None:
        self.pair = pair
        self.out, self.size = frozen.shape
        self.r = r
        self.p = p

    def factors(self, t: Held) -> tuple[Tensor, Tensor]:
        """A [k, in] and B [out, k] of the update ``scaling * B A``."""
        raise NotImplementedError

    def shared(self, t: Held) -> tuple[Tensor, Tensor]:
        """The adapter's projections, where and as its own tensors are."""
        like = t[self.tables[0]]
        return self.pair[0][t.name].to(like), self.pair[1][t.name].to(like)

    def dropped(self, t: Held) -> float:
        return self.p if self.dropout in t and t[self.dropout].training else 0.0

    def low_rank(self, t: Held) -> LowRank | None:
        """In training no gradients of projections are to be made: `leave`."""
        return None if torch.is_grad_enabled() else LowRank(*self.factors(t), self.scaling, self.dropped(t))

    def leave(self, t: Held, x: Tensor, y: Tensor, bias: Tensor | None, frozen: Frozen) -> Tensor:
        return outside(y, x, LowRank(*self.factors(t), self.scaling, self.dropped(t)))

    def update(self, t: Held, dtype: torch.dtype) -> Tensor:
        a, b = self.factors(t)
        return self.scaling * (b.to(dtype) @ a.to(dtype))

    def fill(self, t: Held, table: str, value: Tensor, frozen: Frozen, dtype: torch.dtype) -> None:
        t[table] = nn.Parameter(value.to(frozen.device, dtype))

    def add_dropout(self, t: Held) -> None:
        if self.p > 0:
            t[self.dropout] = nn.Dropout(self.p)


class ProjectedMethod(LayerMethod):
    """One such adapter in a host."""

    #: the names of A and B, in the host and in files
    projections: ClassVar[tuple[str, str]]

    def project(self, out: int, size: int) -> tuple[Tensor, Tensor]:
        """A and B for layers of at most these widths, from the seed."""
        raise NotImplementedError

    def prepare(self, host: Site, layers: list[Frozen]) -> None:
        config: Any = self.config
        made = self.project(*(max(layer.shape[i] for layer in layers) for i in (0, 1)))
        device, dtype = layers[0].device, host.adapter_dtype(layers[0].layer)
        for table, value in zip(self.projections, made, strict=True):
            if table not in host.base_model._modules:
                host.base_model.add_module(table, Projections())
            host.base_model._modules[table].put(self.name, value.to(device, dtype), config.save_projection)

    def pair(self, host: Site) -> Any:
        """The modules that hold A and B."""
        return tuple(host.base_model._modules[table] for table in self.projections)

    def detach(self, host: Site) -> None:
        super().detach(host)
        for table in self.projections:
            if (held := host.base_model._modules.get(table)) is not None:
                held._buffers.pop(self.name, None)
                held._non_persistent_buffers_set.discard(self.name)
                if not held._buffers:
                    del host.base_model._modules[table]

    def _in_files(self, host: Site) -> dict[str, Tensor]:
        if not self.config.save_projection:  # type: ignore[attr-defined]
            return {}
        return {f"base_model.{t}": m[self.name] for t, m in zip(self.projections, self.pair(host), strict=True)}

    def tensors(self, host: Site) -> dict[str, Tensor]:
        return super().tensors(host) | self._in_files(host)

    def load(self, host: Site, tensors: dict[str, Tensor]) -> None:
        super().load(host, tensors)
        for key, value in self._in_files(host).items():
            value.copy_(tensors[key])

    def as_written(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """HF PEFT's RandLoRA writes the projections once more for every layer."""
        shared = {t: tensors[f"base_model.{t}"] for t in self.projections if f"base_model.{t}" in tensors}
        return {
            key: value for key, value in tensors.items()
            if key.rpartition(".")[0] == "base_model" or (own := shared.get(key.rpartition(".")[2])) is None
            or not torch.equal(own, value)
        }  # fmt: skip
