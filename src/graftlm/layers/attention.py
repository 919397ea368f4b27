"""torch's MultiheadAttention with adapters: it reads the weights of its projections itself, so adapters act as weights.

    q, k, v ──→ in_proj_weight [3E, E] ──→ attention ──→ out_proj.weight [E, E] ──→ y
                adapters folded in                       adapters folded in

Two `Adapted` modules stand for one attention, this one and an `Adapted` in the place of `out_proj` inside it, which nobody
calls. Gradients flow through the folded weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import base_modules
from ..errors import UnsupportedError
from ..routing import active_routes
from .adapted import Adapted
from .frozen import Frozen, with_parameters

# torch's own blocks that in evaluation compute everything in one kernel, out of the weights, past the modules in them
FUSED = (nn.TransformerEncoder, nn.TransformerEncoderLayer)


class AdaptedAttention(Adapted):
    """In place of a MultiheadAttention whose queries, keys and values have one width."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Inputs and outputs are the module's own."""
        frozen, attention = self.frozen, self.frozen.layer
        if any(active_routes(owner.switch) is not None for owner in frozen.over):
            raise UnsupportedError(
                "torch's MultiheadAttention computes by its weights, which cannot be another adapter's for each row. "
                "Run one adapter a batch on this model."
            )
        projection: Frozen | None = getattr(attention.out_proj, "frozen", None)
        own = as_they_act(frozen)
        output = None if projection is None else with_parameters(projection.layer, as_they_act(projection))
        if not own and projection is None:
            return attention(*args, **kwargs)
        return with_parameters(attention, own, {} if output is None else {"out_proj": output})(*args, **kwargs)


def as_they_act(frozen: Frozen) -> dict[str, Tensor | None]:
    """The weight and the bias of a layer under the adapters that act now, by the layer's own names of them."""
    acting, (name, bias_name) = frozen.acting(), frozen.names
    if frozen.folds and frozen.holds() and len(acting) == len(frozen.folds):
        return {}
    plain = frozen.plain
    if not acting:
        return {name: getattr(plain, name), bias_name: getattr(plain, bias_name)}
    weight, bias = frozen.folded(acting, gradients=True)
    own = getattr(plain, name).dtype
    return {name: frozen.rows(weight).to(own), bias_name: None if bias is None else bias.to(own)}


def around(module: nn.Module, switch: Any) -> Adapted:
    """A module of the base with room for adapters."""
    inner = module.frozen if isinstance(module, Adapted) else Frozen(module)
    return (AdaptedAttention if inner.kind == "attention" else Adapted)(module, switch)


def unfuse(base: nn.Module) -> list[Any]:
    """Handles of hooks that keep torch's encoders from their fused kernel, which would leave out the adapters in them."""
    fused = [m for _, m in base_modules(base) if isinstance(m, FUSED) and any(isinstance(p, Adapted) for p in m.modules())]
    return [h for m in fused for h in (m.register_forward_pre_hook(_slow), m.register_forward_hook(_fast, always_call=True))]


_running: list[bool] = []  # for each call of such an encoder that runs, whether the kernel was allowed before


def _slow(module: nn.Module, args: tuple) -> None:
    """Forward pre-hook of an encoder."""
    _running.append(torch.backends.mha.get_fastpath_enabled())
    torch.backends.mha.set_fastpath_enabled(False)


def _fast(module: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook of an encoder, called after failures as well."""
    torch.backends.mha.set_fastpath_enabled(_running.pop())
