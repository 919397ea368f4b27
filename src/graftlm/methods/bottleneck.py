"""Bottleneck adapters: a small residual network at the output of a block's halves.

``h + s * W_up act(W_down h)``, W_down [d, H], W_up [H, d], d = H / reduction_factor.

* houlsby (arXiv:1902.00751): after attention and after the feed-forward half;
* pfeiffer (arXiv:2005.00247): after the feed-forward half only;
* parallel (arXiv:2110.04366): beside the feed-forward half, ``ffn(x) + s * W_up act(W_down x)``, x its input.

The place is the output of the half's last linear layer (of a mixture of experts, which has none: of the whole half),
before the block adds its residual; W_up starts at zero, so an untrained adapter changes nothing. HF PEFT has no such
method; the file's keys are `<module>.bottleneck.down.weight` etc. A network with an activation cannot be folded into
weights: there is no merge.
"""

from __future__ import annotations

import enum
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from ..architectures import base_modules, block_sites, innermost, model_dims
from ..errors import ConfigError, TargetError, nearest
from ..kernels import dropout
from ..routing import Group, Index, by_group
from .base import Method, PeftConfig, PeftType, Site, as_enum, register
from .fields import Number, Positive, Probability, check_expressions
from .targets import as_list, layer_index, matches


class BottleneckPlacement(str, enum.Enum):
    """Where the adapters stand."""

    HOULSBY = "HOULSBY"
    PFEIFFER = "PFEIFFER"
    PARALLEL = "PARALLEL"


# The configuration's fields that name the modules of a place, and the places that a placement uses.
FIELDS = {
    "attention": "attention_modules", "feed_forward": "feed_forward_modules",
    "feed_forward_in": "feed_forward_input_modules",
}  # fmt: skip
USED = {
    BottleneckPlacement.HOULSBY: ("attention", "feed_forward"),
    BottleneckPlacement.PFEIFFER: ("feed_forward",),
    BottleneckPlacement.PARALLEL: ("feed_forward", "feed_forward_in"),
}


@dataclass(kw_only=True)
class BottleneckConfig(PeftConfig):
    """Configuration of bottleneck adapters.

    Args:
        placement: HOULSBY, PFEIFFER or PARALLEL.
        reduction_factor: hidden size over bottleneck size.
        activation: by transformers' name ("relu", "gelu", "silu", "tanh", …).
        scaling: s above; 1 by default (parallel adapters are often used with 4).
        dropout: before W_down, in training.
        layers_to_transform: only blocks with these numbers.
        attention_modules, feed_forward_modules, feed_forward_input_modules: module names (endings or a regular
            expression) of the halves' last and the feed-forward half's first linear layers, or of whole halves; None
            finds them.
        modules_to_save: modules that are trained in full and saved along.
    """

    placement: BottleneckPlacement | str = BottleneckPlacement.PFEIFFER
    reduction_factor: Positive = 16
    activation: str = "relu"
    scaling: Number = 1.0
    dropout: Probability = 0.0
    layers_to_transform: list[int] | int | None = None
    attention_modules: list[str] | str | None = None
    feed_forward_modules: list[str] | str | None = None
    feed_forward_input_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.BOTTLENECK
        self.placement = as_enum(BottleneckPlacement, self.placement, "placement")
        for name in FIELDS.values():
            check_expressions(name, getattr(self, name))
        if self.activation not in ACT2FN:
            raise ConfigError(f"activation={self.activation!r} is unknown to transformers{nearest(self.activation, ACT2FN)}")


class Adapter(nn.Module):
    """``s * W_up act(W_down dropout(x))``: x [..., in] -> [..., out]."""

    def __init__(self, width_in: int, width_out: int, config: BottleneckConfig, device: Any, dtype: torch.dtype) -> None:
        super().__init__()
        size = max(1, int(width_in / config.reduction_factor))
        self.dropout = nn.Dropout(config.dropout)
        self.down = nn.Linear(width_in, size, device=device, dtype=dtype)
        self.up = nn.Linear(size, width_out, device=device, dtype=dtype)
        self.activation: Callable[[Tensor], Tensor] = ACT2FN[config.activation]
        self.scaling = config.scaling
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        return (
            self.up(self.activation(self.down(dropout(x.to(self.down.weight.dtype), self.dropout.p, self.dropout.training))))
            * self.scaling
        )


class OutputHook:
    """The forward hook of one place: its adapters in the order in which they are active, not that of attaching.

    Args:
        host: the wrapper that they belong to.
    """

    def __init__(self, host: Site) -> None:
        self.host = host
        self.adapters: dict[str, tuple[nn.Module, list[Tensor] | None]] = {}  # with what a parallel one reads

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):  # of a whole half: attention's weights, a router's scores
            return self(module, args, output[0]), *output[1:]
        active = [name for name in self.host.active_now() if name in self.adapters]
        inputs = {name: seen.pop() for name in active if (seen := self.adapters[name][1]) is not None}
        if (routes := self.host.routes_now()) is None:
            return self.added(active, output, inputs)

        def change(group: Group, index: Index) -> Tensor | None:
            names = [name for name in group if name in self.adapters]
            return self.added(names, output[index], {n: inputs[n][index] for n in names if n in inputs}) if names else None

        return by_group(routes, output, change)

    def added(self, names: list[str], output: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """`output` [..., H] through some adapters, one after the other; `inputs` [..., in] of parallel ones."""
        for name in names:
            output = output + self.adapters[name][0](inputs.get(name, output)).to(output.dtype)
        return output


class Bottleneck(Method):
    """One set of bottleneck adapters in a host: `host.bottleneck[name]`, one `Adapter` a place."""

    def attach(self, host: Site, *, for_loading: bool = False) -> None:
        config: BottleneckConfig = self.config  # type: ignore[assignment]
        modules = {}
        places = self.places(host)
        self._report_unused(host, places)
        for site, source in places.items():
            frozen = innermost(host.base.get_submodule(site))
            width = features(frozen, host)[1]
            width_in = features(innermost(host.base.get_submodule(source)), host)[0] if source else width
            device, dtype = next(frozen.parameters()).device, host.adapter_dtype(frozen)
            modules[site.replace(".", "/")] = Adapter(width_in, width, config, device, dtype)
        host.bottleneck[self.name] = nn.ModuleDict(modules)

    def places(self, host: Site) -> dict[str, str | None]:
        """Output module -> input module of a parallel adapter (None: the adapter reads the output itself)."""
        config: BottleneckConfig = self.config  # type: ignore[assignment]
        wanted = {site: getattr(config, field) for site, field in FIELDS.items()}
        used = USED[config.placement]  # type: ignore[index]
        open_sites = [s for s in used if not wanted[s]]
        sites = block_sites(host.base, open_sites) if open_sites else {}
        for site in used:
            if patterns := wanted[site]:
                names = [n for n, _ in base_modules(host.base)]
                sites[site] = [n for n in names if matches(patterns, n)]
                if not sites[site]:
                    hint = as_list(patterns, names) if isinstance(patterns, str) else ""
                    raise TargetError(f"{FIELDS[site]}={patterns!r} matches no module of this model{hint}.")
        chosen = {s: [n for n in sites[s] if self._in_layers(n)] for s in used}
        if not chosen["feed_forward"]:
            raise TargetError(f"layers_to_transform={config.layers_to_transform!r} leaves no block.")
        if config.placement is not BottleneckPlacement.PARALLEL:
            return {n: None for s in used for n in chosen[s]}
        outs, ins = chosen["feed_forward"], chosen["feed_forward_in"]
        if len(outs) != len(ins):
            raise TargetError(f"{len(outs)} feed-forward outputs and {len(ins)} inputs: name both in the configuration.")
        return dict(zip(outs, ins, strict=True))

    def _report_unused(self, host: Site, places: dict[str, str | None]) -> None:
        """One warning that names what of the configuration selects nothing."""
        config: BottleneckConfig = self.config  # type: ignore[assignment]
        names = [n for n, _ in base_modules(host.base)]
        unused = []
        for site, field in FIELDS.items():
            patterns = getattr(config, field)
            if patterns and site not in USED[config.placement]:  # type: ignore[index]
                unused.append(f"{field} (placement {config.placement.value} has no adapter there)")  # type: ignore[attr-defined,union-attr]
                continue
            for entry in patterns if isinstance(patterns, list) else ():
                if not any(matches([entry], n) for n in names):
                    unused.append(f"{field}: {entry!r}{nearest(entry, {n.rpartition('.')[2] for n in names}, cutoff=0.4)}")
        layers = {layer_index(name, None) for name in places}
        wanted = config.layers_to_transform
        unused += [
            f"layers_to_transform: {n}" for n in ([wanted] if isinstance(wanted, int) else wanted or ()) if n not in layers
        ]
        if unused:
            warnings.warn(f"These entries select nothing and have no effect: {', '.join(unused)}", stacklevel=2)

    def _in_layers(self, name: str) -> bool:
        wanted = self.config.layers_to_transform  # type: ignore[attr-defined]
        index = layer_index(name, None)
        return wanted is None or index == wanted or (isinstance(wanted, (list, tuple)) and index in wanted)

    def connect(self, host: Site) -> list[Any]:
        handles = []
        for place, source in self.places(host).items():
            adapter = host.bottleneck[self.name][place.replace(".", "/")]
            module = host.base.get_submodule(place)
            hooks = module._forward_hooks.values()
            site = next((h for h in hooks if isinstance(h, OutputHook) and h.host is host), None)
            if site is None:
                site = OutputHook(host)
                handles.append(module.register_forward_hook(site))
            seen: list[Tensor] | None = None
            if source is not None:
                seen = []
                reader = host.base.get_submodule(source)
                handles.append(reader.register_forward_pre_hook(self._note(host, seen), with_kwargs=True))
            site.adapters[self.name] = adapter, seen
        return handles

    def _note(self, host: Site, seen: list[Tensor]) -> Callable:
        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if self.name in host.active_now():
                seen[:] = (*args, *kwargs.values())[:1]

        return note

    def detach(self, host: Site) -> None:
        del host.bottleneck[self.name]

    def named_parameters(self, host: Site) -> Iterator[tuple[str, nn.Parameter]]:
        for key, parameter in host.bottleneck[self.name].named_parameters():
            yield f"bottleneck.{self.name}.{key}", parameter

    def tensors(self, host: Site) -> dict[str, Tensor]:
        return {key: p.detach() for key, p in self._file_parameters(host)}

    def _file_parameters(self, host: Site) -> Iterator[tuple[str, nn.Parameter]]:
        for key, parameter in host.bottleneck[self.name].named_parameters():
            site, _, part = key.partition(".")
            yield f"{self.file_prefix}{site.replace('/', '.')}.bottleneck.{part}", parameter

    def load(self, host: Site, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for key, parameter in self._file_parameters(host):
                parameter.copy_(tensors[key])


def features(module: Any, host: Site) -> tuple[int, int]:
    """Input and output width of a linear layer (GPT-2's Conv1D lies the other way round), or of a block's half."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    if getattr(module, "weight", None) is not None:
        raise ConfigError(f"{type(module).__name__} is no linear layer; bottleneck adapters attach to linear layers.")
    first = next((m for m in module.modules() if isinstance(m, nn.Linear)), None)
    width = model_dims(host.base).hidden if first is None else first.in_features
    return width, width


register(PeftType.BOTTLENECK, BottleneckConfig, Bottleneck)
