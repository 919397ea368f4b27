"""The report of what is attached where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .adapters import AdapterSet
from .architectures import base_modules, held_parameters
from .errors import UnsupportedError
from .layers import Adapted, ModulesToSaveWrapper, adapted_layers
from .methods.layered import LayerMethod


@dataclass(frozen=True)
class LayerStatus:
    """What is attached at one place. `requires_grad` says it by adapter ("irregular" if its tensors differ)."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None  # "int8", "4bit", "torchao"


@dataclass(frozen=True)
class ModelStatus:
    """The same for a whole model."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str] | str
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


def uniform(values: list[Any]) -> Any:
    return values[0] if len(set(values)) == 1 else "irregular"


def module_type(host: AdapterSet, module: nn.Module, name: str) -> str:
    """What stands at an adapted place, as HF PEFT names it: "lora.Linear"."""
    if isinstance(module, ModulesToSaveWrapper):
        return type(module).__name__
    if not isinstance(module, Adapted):
        return type(module).__module__.rpartition(".")[2] + "." + type(module).__name__
    frozen = module.frozen
    kind = {"parameter": "ParamWrapper", "linear": "Linear"}.get(frozen.kind, type(frozen.layer).__name__)
    return f"{host.methods[name].config.peft_type.value.lower()}.{kind}"  # type: ignore[union-attr]


def layer_status(host: AdapterSet) -> list[LayerStatus]:
    """One entry for each LoRA layer, each trained module, and each soft prompt or set of bottleneck adapters."""
    holders = {id(p): f"model.{path}" for path, module in base_modules(host.base) for p in held_parameters(module)}
    places: dict[str, dict[str, list[nn.Parameter]]] = {}
    for name in host.methods:
        for key, parameter in host.adapter_parameters(name):
            place = holders.get(id(parameter)) or key.split(".")[0]
            places.setdefault(place, {}).setdefault(name, []).append(parameter)
    order = list(dict.fromkeys(holders.values()))
    result = []
    for place, found in sorted(places.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)):
        module = host.base_model.get_submodule(place) if place.startswith("model.") else host.get_submodule(place)
        result.append(
            LayerStatus(
                name=place,
                module_type=module_type(host, module, next(iter(found))),
                enabled=host.switch.enabled,
                active_adapters=[n for n in host.switch.active if n in found],
                merged_adapters=list(getattr(module, "merged_adapters", [])),
                requires_grad={n: uniform([p.requires_grad for p in ps]) for n, ps in found.items()},
                available_adapters=sorted(found),
                devices={n: sorted({p.device.type for p in ps}) for n, ps in found.items()},
                quantization_backend=module.frozen.quantized if isinstance(module, Adapted) else None,
            )
        )
    if not result:
        raise UnsupportedError("No adapter is attached.")
    return result


def model_status(host: AdapterSet) -> ModelStatus:
    """Summary over `layer_status`."""
    layers = layer_status(host)
    trainable, total = host.get_nb_trainable_parameters()
    parameters = {n: [p for _, p in host.adapter_parameters(n)] for n in host.methods}
    return ModelStatus(
        base_model_type=type(host.base).__name__,
        adapter_model_type=model_type(host),
        peft_types={n: c.peft_type.value for n, c in host.peft_config.items()},  # type: ignore[union-attr]
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=host.switch.enabled,
        active_adapters=host.active_adapters,
        merged_adapters=merged_names(host),
        requires_grad={n: uniform([p.requires_grad for p in ps]) for n, ps in parameters.items()},
        available_adapters=sorted(host.methods),
        devices={n: sorted({p.device.type for p in ps}) for n, ps in parameters.items()},
        quantization_backend=uniform([layer.quantization_backend for layer in layers]),
    )


def merged_names(host: AdapterSet) -> list[str] | str:
    """The merged adapters; "irregular" where one is merged in some of the layers that it changes only (`layer.merge`)."""
    layers = [layer for _, layer in adapted_layers(host.base, host.switch)]
    merged = sorted({n for layer in layers for n in layer.merged_adapters})
    apart = any(n in layer.changes and n not in layer.merged_adapters for n in merged for layer in layers)
    return "irregular" if apart else merged


def model_type(host: AdapterSet) -> str:
    """HF PEFT's name for the level below the wrapper where all methods change layers ("LoraModel"); else "PeftModel"."""
    kinds = [type(m.config).__name__.removesuffix("Config") for m in host.methods.values() if isinstance(m, LayerMethod)]
    return f"{kinds[0]}Model" if len(kinds) == len(host.methods) else "PeftModel"
