"""What LoRA, MiSS, OFT and BOFT share: biases of the base that are trained along."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..architectures import base_modules, clean_path
from ..errors import ConfigError, UnsupportedError
from ..layers import KINDS, Adapted, as_it_was, both_forms
from ..routing import by_group
from .base import Site
from .fields import check_expressions
from .layered import LayerConfig, LayerMethod


@dataclass(kw_only=True)
class BiasedConfig(LayerConfig):
    """Fields of such a method.

    Args:
        bias: "none", "all", or the method's own word for the biases of the layers that it changes.
        layers_to_transform, layers_pattern: only layers with these numbers (in a module list of that name).
    """

    bias: str = "none"
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    own_biases: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bias not in ("none", "all", self.own_biases):
            raise ConfigError(f"bias={self.bias!r}: expected 'none', 'all' or {self.own_biases!r}.")
        for pattern in [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or ():
            check_expressions("layers_pattern", pattern)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern is given without layers_to_transform; name the layers' numbers there.")


class Biased(LayerMethod):
    """One adapter that changes layers of a host, and trains biases along where its configuration says so."""

    @property
    def own_biases(self) -> str:
        """The configuration's word for the biases of the layers that it changes."""
        return self.config.own_biases  # type: ignore[attr-defined]

    @property
    def bound(self) -> bool:
        return self.config.bias != "none"  # type: ignore[attr-defined]

    def attach(self, host: Site, *, for_loading: bool = False) -> None:
        if self.config.bias == "none":  # type: ignore[attr-defined]
            super().attach(host, for_loading=for_loading)
            return
        self._one_bias(host)
        super().attach(host, for_loading=for_loading)
        try:
            self._add_biases(host)
        except Exception:
            self.detach(host)
            raise

    def _add_biases(self, host: Site) -> None:
        """Copies of the base's, which this adapter trains."""
        host.adapter_biases[self.name] = nn.ParameterDict(
            {
                path.replace(".", "/"): module.bias.detach().to(host.adapter_dtype(module), copy=True)
                for path, module in self._biased(host)
            }
        )

    @contextmanager
    def taking_biases(self, host: Site, word: str) -> Iterator[None]:
        """Let the attached adapter, whose configuration says "none", have the biases of `word` as well; after an error it is
        as it was."""
        config: Any = self.config
        trains = any(p.requires_grad for _, p in self.named_parameters(host))
        config.bias = word
        try:
            self._one_bias(host)
            self._add_biases(host)
            host.adapter_biases[self.name].requires_grad_(trains)
            yield
        except Exception:
            config.bias = "none"
            self._remove_biases(host)
            raise
        host._connect(self)  # type: ignore[attr-defined]

    def _one_bias(self, host: Site) -> None:
        others = [n for n, m in host.methods.items() if n != self.name and getattr(m.config, "bias", "none") != "none"]
        if others:
            raise ConfigError(f"bias={self.config.bias!r} beside adapter {others[0]!r}, which trains biases too: one can.")  # type: ignore[attr-defined]

    def _biased(self, host: Site) -> Iterator[tuple[str, Any]]:
        """Modules whose bias is trained: the wrapped layers' own, or every one of the base."""
        config: Any = self.config
        own = {id(layer.frozen.layer) for _, layer in self.layers(host)}
        for path, module in base_modules(host.base):
            if config.bias != "all" and id(module) not in own:
                continue
            attention = isinstance(module, nn.MultiheadAttention)  # it has biases, and adds them within
            if isinstance(module, Adapted) or (module._parameters.get("bias") is None and not attention):
                continue
            if "original_module" in path.split(".") and id(module) not in own:  # another copy of it is trained in full
                continue
            if attention or not isinstance(module, (nn.Linear, Conv1D, nn.LayerNorm, *KINDS["conv"])):
                raise UnsupportedError(
                    f"bias={config.bias!r} would train the bias of {path!r}, a {type(module).__name__}, which may not "
                    f"simply be added to its output. Use bias={self.own_biases!r} or 'none'."
                )
            yield clean_path(path), module

    def _remove_biases(self, host: Site) -> None:
        if self.name in host.adapter_biases:
            del host.adapter_biases[self.name]

    def detach(self, host: Site) -> None:
        self._remove_biases(host)
        super().detach(host)

    def connect(self, host: Site) -> list[Any]:
        """Add the trained biases, as differences to the base's, to the outputs of their modules."""
        if self.name not in host.adapter_biases:
            return []
        handles = []
        biases: Any = host.adapter_biases[self.name]
        owners = {id(layer.frozen.layer): layer for _, layer in self.layers(host)}
        for path, module in self._biased(host):
            bias = biases[path.replace(".", "/")]
            if id(module) in owners:
                owners[id(module)].biases[self.name] = bias

            axes = len(getattr(module, "kernel_size", ()))  # behind a convolution's channels

            def add(module: Any, args: Any, output: Tensor, bias: Tensor = bias, axes: int = axes) -> Tensor:
                if self.name not in host.active_now():
                    return output
                change = (bias - as_it_was(module).bias).to(output.dtype)[(..., *[None] * axes)]
                if (routes := host.routes_now()) is None:
                    return output + change
                return by_group(routes, output, lambda group, at: output[at] + change if self.name in group else None)

            handles += [form.register_forward_hook(add) for form in both_forms(module)]
        return handles

    def named_parameters(self, host: Site) -> Iterator[tuple[str, nn.Parameter]]:
        yield from super().named_parameters(host)
        if self.name in host.adapter_biases:
            for key, parameter in host.adapter_biases[self.name].items():
                yield f"adapter_biases.{self.name}.{key}", parameter

    def file_parameters(self, host: Site) -> Iterator[tuple[str, Any]]:
        yield from super().file_parameters(host)
        if self.name in host.adapter_biases:
            own = {path for path, _ in self.layers(host)}
            for key, parameter in host.adapter_biases[self.name].items():
                path = key.replace("/", ".")
                yield f"{self.file_prefix}{path}{'.base_layer' if path in own else ''}.bias", parameter
