"""LoRA's modules: a frozen layer with any number of low-rank updates beside it.

Shapes: x [..., in]; A [r, in]; B [out, r]; the update is ``scale * B(A(x))`` [..., out].

* LoRA, https://arxiv.org/abs/2106.09685 eq. 3; scale = lora_alpha / r, or lora_alpha / sqrt(r) (rsLoRA, arXiv:2312.03732).
* DoRA, https://arxiv.org/abs/2402.09353 eq. 5: ``W' = m * (W + scale*BA) / ||W + scale*BA||`` by rows of the output, the
  norm held constant in the gradient.
* PiSSA, OLoRA and LoftQ (see `lora_init`) start from factors that come from W and train against the residual
  ``W - scale*B0*A0``. HF PEFT overwrites the base weight by that residual; here the base stays as it is, the start
  factors are kept beside the trained ones and subtracted, so that the base can be shared, switched back and wrapped twice.

Parameter names are HF PEFT's (`lora_A.<adapter>.weight`, `lora_embedding_A.<adapter>`, `lora_magnitude_vector…`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedError
from ..kernels import Update, adapted_linear, dropout, grouped_low_rank, low_rank
from ..quantization import dequantize, dequantized, quantized_kind, requantized
from ..routing import Group, Index, Routes, Switch, active_adapters, active_routes, by_group
from .folds import Fold, as_it_was, fold_of, with_weight
from .lora_init import start_factors


class Magnitude(nn.Module):
    """DoRA's trained length of every output row: weight [out]."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class LoraLayer(nn.Module):
    """Common part of the wrapped layers. `base_layer` is the frozen module; adapters are kept by name.

    Args:
        base_layer: the module that stood here.
        switch: of the wrapper that put this in place; it says which adapters apply.
    """

    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    lora_magnitude_vector: Any

    def __init__(self, base_layer: nn.Module, switch: Switch) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.switch = switch
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.lora_dropout = nn.ModuleDict()
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()
        self.lora_magnitude_vector = nn.ModuleDict()
        self.start: dict[str, tuple[Tensor, Tensor]] = {}  # PiSSA, OLoRA, LoftQ: A0, B0
        self.trained_bias: Tensor | None = None  # set by the method where `bias` is trained
        self.train(base_layer.training)

    # -- what others ask ---------------------------------------------------------------------------------------------
    @property
    def weight(self) -> Tensor:
        """The base weight (models look at `layer.weight.dtype` and `.device`)."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias  # type: ignore[return-value]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    @property
    def fold(self) -> Fold | None:
        """What this wrapper has merged here."""
        fold = fold_of(self.frozen)
        return fold if fold is not None and fold.switch is self.switch else None

    @property
    def merged_adapters(self) -> list[str]:
        fold = self.fold
        return [] if fold is None else list(fold.parts)

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @property
    def active_adapters(self) -> list[str]:
        return [n for n in active_adapters(self.switch) if n in self.scaling]

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    def parts(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of one adapter in this layer, with their names below the layer."""
        for table in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"):
            held = getattr(self, table)
            if name not in held:
                continue
            if isinstance(held[name], nn.Parameter):
                yield f"{table}.{name}", held[name]
            else:
                yield from ((f"{table}.{name}.{key}", parameter) for key, parameter in held[name].named_parameters())

    # -- building ----------------------------------------------------------------------------------------------------
    def add(
        self, name: str, r: int, alpha: float, config: Any, dtype: torch.dtype, *, initialise: bool,
        original: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Put an adapter in. `config` is a `LoraConfig`; `original` [out, in] the unquantised weight, for LoftQ."""
        self.r[name] = r
        self.lora_alpha[name] = alpha
        self.scaling[name] = alpha / math.sqrt(r) if config.use_rslora else alpha / r
        self.lora_dropout[name] = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        self.lora_dropout[name].train(self.training)
        self.create(name, r, dtype, self.frozen.weight.device)  # type: ignore[arg-type]
        init = config.init_lora_weights
        quantised = quantized_kind(self.frozen) is not None
        if initialise or (isinstance(init, str) and init != "gaussian" and not (init == "loftq" and quantised)):
            self.initialise(name, config, original)
        if config.use_dora:
            self.lora_magnitude_vector[name] = Magnitude(self.adapted_norm(name, torch.float32).to(dtype))

    def create(self, name: str, r: int, dtype: torch.dtype, device: torch.device) -> None:
        raise NotImplementedError

    def initialise(self, name: str, config: Any, original: Tensor | None) -> None:
        raise NotImplementedError

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r]."""
        raise NotImplementedError

    def remove(self, name: str) -> None:
        """Take an adapter out; a merged one is unmerged first."""
        if name in self.merged_adapters:
            self.unmerge(name)
        self.trained_bias = None
        for table in (self.r, self.lora_alpha, self.scaling, self.start):
            table.pop(name, None)
        for module in (self.lora_dropout, self.lora_A, self.lora_B, self.lora_magnitude_vector):
            if name in module:
                del module[name]
        for parameters in (self.lora_embedding_A, self.lora_embedding_B):
            if name in parameters:
                del parameters[name]

    # -- weights -----------------------------------------------------------------------------------------------------
    @property
    def innermost(self) -> LoraLayer:
        """The LoRA module that holds the base's own layer (a base that is wrapped twice has one in another)."""
        layer: LoraLayer = self
        while isinstance(layer.base_layer, LoraLayer):
            layer = layer.base_layer
        return layer

    @property
    def frozen(self) -> Any:
        """The base's own layer, with what is merged into it."""
        layer: Any = self._modules["base_layer"]
        while isinstance(layer, LoraLayer):
            layer = layer._modules["base_layer"]
        return layer

    def float_weight(self) -> Tensor:
        """The base weight before any merge, in floating point, [out, in] whatever the layer's own layout."""
        return self.as_rows(dequantize(as_it_was(self.frozen)))

    def as_rows(self, weight: Tensor) -> Tensor:
        """Between the layer's layout and [out, in]; its own inverse."""
        return weight

    def update(self, name: str, dtype: torch.dtype) -> Tensor:
        """``scale * (BA - B0A0)`` [out, in]."""
        a, b = self.factors(name)
        delta = b.to(dtype) @ a.to(dtype)
        if name in self.start:
            a0, b0 = self.start[name]
            delta = delta - b0.to(dtype) @ a0.to(dtype)
        return delta * self.scaling[name]

    def adapted_norm(self, name: str, dtype: torch.dtype) -> Tensor:
        """Length of every row of ``W + update``: [out]; no gradient."""
        with torch.no_grad():
            return torch.linalg.vector_norm(self.float_weight().to(dtype) + self.update(name, dtype), dim=1)

    def get_delta_weight(self, name: str) -> Tensor:
        """What merging this adapter adds to the base weight, fp32, in the layer's own layout."""
        update = self.update(name, torch.float32)
        if name in self.lora_magnitude_vector:
            weight = self.float_weight().float()
            ratio = self.lora_magnitude_vector[name].weight.float() / self.adapted_norm(name, torch.float32)
            update = ratio[:, None] * (weight + update) - weight
        return self.as_rows(update)

    def merge(self, names: list[str], *, keep: bool = True, requantize: bool = False) -> None:
        """Fold adapters into the base weight; those that have changed since they were merged, anew.

        Without `keep` there is no way back. A quantised layer is replaced by a bf16 copy, or with `requantize` by a
        quantised one (which rounds the update away in part).
        """
        if (fold := self.fold) is not None and not fold.fresh:
            names = list(dict.fromkeys([*fold.parts, *names]))
            self.unmerge()
        names = self.unmerged(names)
        if not names:
            return
        frozen, fold = self.frozen, self.fold
        with torch.no_grad():
            new = self.merged_weight(names)
            if quantized_kind(frozen) is not None:
                made: Any = requantized(frozen, new) if requantize else dequantized(frozen, new)
                fold = Fold(frozen, self.switch, requantize) if fold is None else fold
                self.innermost.base_layer = made
            else:  # a parameter of its own: the old one may be tied to another layer
                fold = Fold(with_weight(frozen, frozen.weight), self.switch, requantize) if fold is None else fold
                frozen.weight = nn.Parameter(new.to(frozen.weight.dtype).contiguous(), requires_grad=False)
        if keep:
            self.frozen.__dict__["fold"] = fold
            self.note(fold, [*fold.parts, *names])

    def note(self, fold: Fold, names: list[str]) -> None:
        """What is merged here has the values that `names` have now."""
        for name in names:
            fold.note(name, self.lora_dropout[name], [parameter for _, parameter in self.parts(name)])

    def unmerged(self, names: list[str]) -> list[str]:
        """Those of the adapters that are here and not merged."""
        return [n for n in names if n in self.scaling and n not in self.merged_adapters]

    @torch.no_grad()
    def merged_weight(self, names: list[str]) -> Tensor:
        """The weight with adapters folded in, fp32, in the layer's own layout."""
        return dequantize(self.frozen).float() + sum(self.get_delta_weight(n) for n in self.unmerged(names))

    def unmerge(self, name: str | None = None) -> None:
        """Put the base weight back, bit for bit; with a name, all but that one is merged again."""
        if (fold := self.fold) is None:
            return
        frozen = self.frozen
        if quantized_kind(fold.plain) is not None:
            self.innermost.base_layer = as_it_was(frozen)
        else:
            frozen.weight = fold.plain.weight
        frozen.__dict__.pop("fold")
        if name is not None:
            self.merge([n for n in fold.parts if n != name], requantize=fold.requantize)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves and casts: also of the weight as it was."""
        fold = fold_of(self.frozen)
        fresh = fold is not None and fold.fresh
        super()._apply(fn, recurse)
        if fold is not None and self.innermost is self:
            fold.plain._apply(fn)
        if fold is not None and fresh and fold.switch is self.switch:
            self.note(fold, list(fold.parts))
        return self

    def plain_output(self, result: Tensor) -> Tensor:
        """The base layer's output without its bias (with the bias that is trained, where one is)."""
        bias = self.trained_bias if self.trained_bias is not None else self.bias
        return result if bias is None else result - bias

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in] (token ids [...] for an embedding) -> [..., out]."""
        fold = fold_of(self.frozen)
        folded = fold is not None and fold.holds()
        layer = self.base_layer
        if fold is not None and not folded and layer is self.frozen:
            layer = as_it_was(layer)
        result = layer(x, *args, **kwargs)
        routes = active_routes(self.switch)
        if routes is not None:
            return self.add_routed(routes, x, result)
        within = self.merged_adapters if folded else ()
        for name in self.active_adapters:
            if name not in within:
                result = self.add_update(name, x, result)
        return result

    def add_routed(self, routes: Routes, x: Tensor, result: Tensor) -> Tensor:
        """`result` with the updates of a mixed batch: each row's adapters, in its order."""

        def change(group: Group, index: Index) -> Tensor | None:
            names = [n for n in group if n in self.scaling]
            part = result[index] if names else None
            for name in names:
                part = self.add_update(name, x[index], part)  # type: ignore[arg-type]
            return part

        return by_group(routes, result, change)

    def add_update(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        """`result`, the output so far, with what one adapter adds to it."""
        return result + self.delta(name, x, result).to(result.dtype)

    def delta(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        """What one adapter adds to `result`, the output so far."""
        raise NotImplementedError


class Linear(LoraLayer):
    """Over nn.Linear, quantised linears, and GPT-2's Conv1D (whose weight lies [in, out])."""

    def __init__(self, base_layer: nn.Module, switch: Switch) -> None:
        super().__init__(base_layer, switch)
        self.fan_in_fan_out = isinstance(self.frozen, Conv1D)
        if self.fan_in_fan_out:
            self.in_features, self.out_features = self.frozen.weight.shape  # type: ignore[misc]
        else:
            self.in_features, self.out_features = self.frozen.in_features, self.frozen.out_features

    def as_rows(self, weight: Tensor) -> Tensor:
        return weight.T if self.fan_in_fan_out else weight

    def create(self, name: str, r: int, dtype: torch.dtype, device: torch.device) -> None:
        options = {"bias": False, "device": device, "dtype": dtype}
        self.lora_A[name] = nn.utils.skip_init(nn.Linear, self.in_features, r, **options)
        self.lora_B[name] = nn.utils.skip_init(nn.Linear, r, self.out_features, **options)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        return self.lora_A[name].weight, self.lora_B[name].weight

    def initialise(self, name: str, config: Any, original: Tensor | None) -> None:
        a, b = self.factors(name)
        init = config.init_lora_weights
        with torch.no_grad():
            if init == "gaussian":
                nn.init.normal_(a, std=1 / self.r[name])
                nn.init.zeros_(b)
            elif isinstance(init, str):
                weight = self.float_weight().float()
                start_a, start_b = start_factors(config, weight, original, self.r[name], self.scaling[name])
                a.copy_(start_a)
                b.copy_(start_b)
                if original is None:  # a LoftQ adapter of a quantised base makes up for its rounding: nothing to subtract
                    self.start[name] = (a.detach().clone(), b.detach().clone())
            else:  # True as in the paper's code; False (for tests) keeps both random
                nn.init.kaiming_uniform_(a, a=math.sqrt(5))
                nn.init.zeros_(b) if init else nn.init.kaiming_uniform_(b, a=math.sqrt(5))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made = None if args or kwargs else self.at_once(x)
        return super().forward(x, *args, **kwargs) if made is None else made

    def at_once(self, x: Tensor) -> Tensor | None:
        """The layer's output with its one plain adapter, in one function; None where more is asked for."""
        names = self.active_adapters if torch.is_grad_enabled() else []
        layer = self.base_layer
        kind = getattr(type(layer), "plain_class", type(layer))
        if len(names) != 1 or kind not in (nn.Linear, Conv1D) or active_routes(self.switch) is not None:
            return None
        if self.special(names[0]) or fold_of(layer) is not None or not untouched(layer):
            return None
        weight = self.as_rows(layer.weight)
        return adapted_linear(x, weight, layer.bias, *self.factors(names[0]), self.scaling[names[0]], self.dropped(names[0]))

    def special(self, name: str) -> bool:
        """Whether an adapter's update is more than ``scale * B A dropout(x)``."""
        return name in self.start or name in self.lora_magnitude_vector

    def watched(self) -> bool:
        """Whether somebody's hook has seen the output so far, which must then stay as it is."""
        seen = self.base_layer._forward_hooks or self.frozen._forward_hooks
        return bool(seen or torch.nn.modules.module._global_forward_hooks)

    def dropped(self, name: str) -> float:
        """The probability at which an adapter drops its input now."""
        drop = self.lora_dropout[name]
        return drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0

    def add_update(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        """By one function, into `result` itself; in training its products are made in the activations' dtype."""
        factors, scale, p = self.factors(name), self.scaling[name], self.dropped(name)
        if self.special(name) or self.watched() or not result.is_contiguous():
            return super().add_update(name, x, result)
        if torch.is_grad_enabled():
            return low_rank(result, x, *factors, scale, p)
        if p or torch.compiler.is_compiling():
            return super().add_update(name, x, result)
        return grouped_low_rank(result, x, [Update(slice(None), *factors, scale, 0.0)], {})

    def add_routed(self, routes: Routes, x: Tensor, result: Tensor) -> Tensor:
        """Plain updates of a mixed batch all in one function (see `kernels.lora`), the special ones group by group."""
        parts = routes.parts(result)
        names = {n for group, _ in parts for n in group if n in self.scaling}
        precise = torch.is_grad_enabled() or not any(self.dropped(n) for n in names)
        if not names or not precise or any(self.special(n) for n in names) or self.watched():
            return super().add_routed(routes, x, result)
        updates = [
            Update(index, *self.factors(n), self.scaling[n], self.dropped(n), partial(routes.drawing, i))
            for i, (group, index) in enumerate(parts) for n in group if n in self.scaling
        ]  # fmt: skip
        return grouped_low_rank(result, x, updates, routes.kept_for(self))

    def delta(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        """What one adapter adds to the base layer's output."""
        a, b = self.lora_A[name], self.lora_B[name]
        scale = self.scaling[name]
        dropped = dropout(x.to(a.weight.dtype), self.dropped(name))
        update = b(a(dropped)) * scale
        if name in self.start:
            a0, b0 = self.start[name]
            update = update - F.linear(F.linear(x.to(a0.dtype), a0), b0) * scale
        if name not in self.lora_magnitude_vector:
            return update
        if self.training and isinstance(self.lora_dropout[name], nn.Dropout):
            plain = F.linear(dropped, self.float_weight().to(dropped.dtype))
        else:
            plain = self.plain_output(result)
        magnitude = self.lora_magnitude_vector[name].weight
        ratio = magnitude / self.adapted_norm(name, magnitude.dtype)
        return (ratio - 1) * plain + ratio * update


class Embedding(LoraLayer):
    """Over nn.Embedding: A [r, vocabulary], B [hidden, r]; the update of token t is ``scale * B A[:, t]``."""

    def __init__(self, base_layer: nn.Module, switch: Switch) -> None:
        super().__init__(base_layer, switch)
        self.num_embeddings, self.embedding_dim = self.frozen.weight.shape  # type: ignore[misc]

    def as_rows(self, weight: Tensor) -> Tensor:
        return weight.T  # [hidden, vocabulary]: out = hidden, in = vocabulary

    def create(self, name: str, r: int, dtype: torch.dtype, device: torch.device) -> None:
        self.lora_embedding_A[name] = nn.Parameter(torch.zeros(r, self.num_embeddings, dtype=dtype, device=device))
        self.lora_embedding_B[name] = nn.Parameter(torch.zeros(self.embedding_dim, r, dtype=dtype, device=device))

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        return self.lora_embedding_A[name], self.lora_embedding_B[name]

    def initialise(self, name: str, config: Any, original: Tensor | None) -> None:
        init = config.init_lora_weights
        if isinstance(init, str) and init != "gaussian":
            raise UnsupportedError(f"init_lora_weights={init!r} is for linear layers; leave embeddings out.")
        a, b = self.factors(name)
        with torch.no_grad():
            nn.init.normal_(b)
            nn.init.zeros_(a) if init else nn.init.normal_(a)

    def delta(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        a, b = self.factors(name)
        update = F.embedding(x, a.T) @ b.T * self.scaling[name]
        scale = getattr(self.frozen, "embed_scale", None)  # Gemma, BART: the embedding multiplies its output
        if name in self.lora_magnitude_vector:
            magnitude = self.lora_magnitude_vector[name].weight
            ratio = magnitude / self.adapted_norm(name, magnitude.dtype)
            plain = result if scale is None else result / scale
            update = (ratio - 1) * plain + ratio * update
        return update if scale is None else update * scale


def untouched(layer: nn.Module) -> bool:
    """Whether nobody has a hook on a module, or has exchanged its forward."""
    everyones = torch.nn.modules.module
    return not (
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "forward" in layer.__dict__
        or everyones._global_forward_hooks
        or everyones._global_forward_pre_hooks
        or everyones._global_backward_hooks
        or everyones._global_backward_pre_hooks
    )


def wrap(layer: nn.Module, path: str, switch: Switch) -> LoraLayer:
    """The LoRA module for a layer; UnsupportedError for a kind that has none."""
    inner = layer
    while isinstance(inner, LoraLayer):  # another wrapper's: the weights are those of the innermost
        inner = inner.base_layer
    if isinstance(inner, nn.Embedding):
        return Embedding(layer, switch)
    if isinstance(inner, (nn.Linear, Conv1D)):
        return Linear(layer, switch)
    raise UnsupportedError(
        f"LoRA has no form for {path!r}, a {type(inner).__name__}; it takes linear layers (torch's, bitsandbytes', Conv1D) "
        "and embeddings. Name other modules in target_modules."
    )
