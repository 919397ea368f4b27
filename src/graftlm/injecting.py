"""Adapters in a module's own layers, without a wrapper around it: HF PEFT's functions for libraries that keep their models.

The module computes with the adapters that are active, whoever calls it; what hangs on it is kept in its `__dict__`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import AdapterSet
from .architectures import base_modules, clean_path, innermost
from .errors import AdapterError
from .layers import adapted_layers
from .methods import PeftConfig, method_for
from .methods.layered import LayerMethod
from .routing import active_adapters

KEPT = "graftlm_adapters"


class Injected(AdapterSet):
    """The adapters of a module that was changed in place. Calls never come through here."""

    @property
    def plain(self) -> bool:
        return True

    def active_now(self) -> tuple[str, ...]:
        return active_adapters(self.switch)


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, Tensor] | None = None,
) -> nn.Module:
    """Put an adapter into a module's layers, in place; the module's own parameters are frozen.

    Args:
        peft_config: of a method that changes layers.
        model: any torch module, compiled or not; it is returned. Another call adds another adapter, which
            `set_adapter` makes active.
        low_cpu_mem_usage: leave the adapter's tensors on the meta device; `set_peft_model_state_dict` makes them.
        state_dict: an adapter's tensors, whose keys say which layers are changed (instead of `target_modules`). Values are
            not read: `set_peft_model_state_dict` does that.

    Raises:
        AdapterError: the name is taken, or the method needs a wrapper (`get_peft_model`).
        TargetError: no layer matches.
    """
    given, model = model, getattr(model, "_orig_mod", model)
    if isinstance(model, AdapterSet):
        raise AdapterError("This model is wrapped. Add another adapter with model.add_adapter(name, config).")
    method = method_for(peft_config, adapter_name)
    if not isinstance(method, LayerMethod) or method.bound:
        what = "trained biases" if isinstance(method, LayerMethod) else type(peft_config).__name__
        raise AdapterError(
            f"inject_adapter_in_model changes layers only; {what} act through a wrapper. Use get_peft_model(model, config)."
        )
    config = copy.copy(peft_config)
    if state_dict is not None:
        if getattr(config, "target_parameters", None):
            raise AdapterError(
                "Trying to inject a PEFT adapter from a state_dict but the PEFT config uses `target_parameters`: keys do "
                "not tell parameters from modules. Inject it without the state_dict."
            )
        vars(config).update(target_modules=layers_in(model, state_dict), exclude_modules=None)
        for name in {"layers_to_transform", "layers_pattern"} & vars(config).keys():
            setattr(config, name, None)
    host = vars(model).get(KEPT)
    first = host is None
    if host is None:
        host = Injected(model)
    host._attach(adapter_name, config)
    if low_cpu_mem_usage:
        remake(host, adapter_name, on_meta=True)
    host.set_adapter(adapter_name if first else list(host.switch.active))
    vars(model)[KEPT] = host
    vars(model)["peft_config"] = host.peft_config
    return given


def layers_in(model: nn.Module, state_dict: dict[str, Tensor]) -> list[str]:
    """The layers whose adapters a state holds: those behind whose names a key goes on with what the bare layer has not."""
    modules = {clean_path(path): innermost(module) for path, module in base_modules(model)}
    found: dict[str, None] = {}
    for key in state_dict:
        parts = key.removeprefix("base_model.model.").removeprefix("_orig_mod.").split(".")
        last = max((i for i in range(1, len(parts)) if ".".join(parts[:i]) in modules), default=0)
        layer = modules.get(path := ".".join(parts[:last]))
        if last and not any(parts[last] in held for held in (layer._parameters, layer._buffers, layer._modules)):  # type: ignore[union-attr]
            found[path] = None
    if not found:
        raise AdapterError(
            f"state_dict holds no adapter of {type(model).__name__}'s layers; its keys begin {list(state_dict)[:3]}."
        )
    return list(found)


def remake(host: AdapterSet, name: str, *, on_meta: bool) -> None:
    """An adapter's parameters in its layers anew where they are not: on the meta device, or empty beside their layers."""
    for _, layer in adapted_layers(host.base, host.switch):
        for key, parameter in list(layer.parts(name)):
            if parameter.is_meta is not on_meta:
                path, _, last = key.rpartition(".")
                empty = torch.empty_like(parameter, device="meta" if on_meta else layer.frozen.device)
                layer.get_submodule(path)._parameters[last] = nn.Parameter(empty, parameter.requires_grad)


def adapters_of(model: Any) -> AdapterSet:
    """A wrapper itself, or what hangs on a module that was changed in place; also inside of what compiles or shards it.

    Raises:
        AdapterError: a model without adapters.
    """
    model = getattr(model, "_orig_mod", model)
    model = getattr(model, "_fsdp_wrapped_module", model)
    if isinstance(model, AdapterSet):
        return model
    host = vars(model).get(KEPT) if isinstance(model, nn.Module) else None
    if host is None:
        raise AdapterError(
            f"{type(model).__name__} has no adapters: call get_peft_model(model, config) or "
            "inject_adapter_in_model(config, model) first."
        )
    return host


def set_adapter(model: Any, adapter_name: str | list[str], inference_mode: bool = False) -> None:
    """Make adapters of a model active and (unless `inference_mode`) trainable; freeze its others."""
    adapters_of(model).set_adapter(adapter_name, inference_mode)


def delete_adapter(model: Any, adapter_name: str, prefix: str = "") -> list[str] | None:
    """Take an adapter off a model. Returns the adapters that are active then, None for none. (`prefix`: HF PEFT's.)"""
    host = adapters_of(model)
    host.delete_adapter(adapter_name)
    if isinstance(host, Injected):
        vars(host.base)["peft_config"] = host.peft_config
    return list(host.switch.active) or None


def set_requires_grad(model: Any, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
    """Freeze or unfreeze adapters of a model without changing which are active."""
    adapters_of(model).set_requires_grad(adapter_names, requires_grad)


def cast_adapter_dtype(model: Any, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """An adapter's 16-bit parameters in fp32."""
    host = adapters_of(model)
    host._known(adapter_name)
    for _, parameter in host.adapter_parameters(adapter_name) if autocast_adapter_dtype else ():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
