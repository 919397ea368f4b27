"""Modules that an adapter trains in full (a classification head, an output layer): a copy an adapter."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..architectures import base_modules, clean_path, innermost, replace_module
from ..errors import CompositionError, KindError, TargetError, UnsupportedError, nearest
from ..quantization import dequantize, dequantized, in_source_form, quantized_kind
from ..routing import Plan, Switch, active_adapters, active_routes, running, together
from .frozen import as_it_was
from .switched import Switched


class ModulesToSaveWrapper(Switched, nn.Module):
    """In place of a module: the original, and the adapters' trained copies by name. HF PEFT's names.

    Where adapters that are active together each bring a copy, a task's head (`is_head`) is the first one's; for any other
    module that is an error.
    """

    def __init__(self, original_module: nn.Module, switch: Switch) -> None:
        super().__init__()
        self.original_module = original_module
        self.switch = switch
        self.modules_to_save = nn.ModuleDict()
        self.is_head = False
        self.keeps_dtype = False  # whether copies in fp32 give what they make in the precision that came in

    def add(self, name: str, dtype: torch.dtype | None) -> None:
        """A trainable copy for adapter `name`; 16-bit floats become `dtype`."""
        made = bare_copy(self.original_module)
        for parameter in made.parameters():
            parameter.requires_grad = True
        self.modules_to_save[name] = made.to(dtype) if dtype is not None else made

    def held_by(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, copied in self.modules_to_save.items() for p in copied.parameters())

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """An adapter file's keys of this module, and where they go here; transformers' `load_adapter` asks for it."""
        copied = self.modules_to_save[adapter_name]
        return {key: f"modules_to_save.{adapter_name}.{key}" for key in copied.state_dict()}

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters that have a copy here."""
        return [name for name in active_adapters(self.switch) if name in self.modules_to_save]

    @property
    def active(self) -> nn.Module:
        """The module that computes now."""
        return self.of(active_adapters(self.switch))

    def of(self, group: Iterable[str]) -> nn.Module:
        """The module that computes under a composition of adapters."""
        group = tuple(group)
        names = [n for n in group if n in self.modules_to_save]
        if names and len(group) > 1 and (lost := self.changing(set(group) - set(names))):
            raise CompositionError(
                f"Adapter {names[0]!r} trains a {type(innermost(self.original_module)).__name__} in full (modules_to_save) "
                f"that {', '.join(lost)} has changes of: only one of them can be active."
            )
        if len(names) > 1 and not self.is_head:
            raise CompositionError(
                f"Adapters {', '.join(names)} each bring their own copy of one module (modules_to_save); only one of them "
                "can be active."
            )
        return self.modules_to_save[names[0]] if names else self.original_module

    def changing(self, names: set[str]) -> list[str]:
        """Those of the adapters that have changes of layers in the original module."""
        inside = (m for _, m in base_modules(self.original_module) if getattr(m, "switch", None) is self.switch)
        return sorted({n for m in inside for n in getattr(m, "changes", ()) if n in names})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        routes = active_routes(self.switch)
        if routes is None:
            return self.call(self.active, args, kwargs)
        x = next((v for v in (*args, *kwargs.values()) if torch.is_tensor(v)), None)
        if x is None:
            raise UnsupportedError(
                f"{type(self.original_module).__name__} is trained in full (modules_to_save) and reads no tensor whose rows "
                "could be told apart in a batch of different adapters. Run one adapter a batch."
            )
        made: list[tuple[Any, Any]] = []
        chosen = [(self.of(group), group, index) for group, index in routes.parts(x)]
        whole: Any = None
        if together() and any(module is self.original_module for module, _, _ in chosen):
            whole = self.call(self.original_module, args, kwargs)  # other wrappers' adapters in it keep their routes
        for module, group, index in chosen:
            if module is self.original_module and whole is not None:
                made.append((index, whole[index] if isinstance(whole, torch.Tensor) else whole))
                continue
            with running(Plan(self.switch, group)):
                made.append((index, self.call(module, *part_of((args, kwargs), x, index))))
        if not all(isinstance(part, torch.Tensor) for _, part in made):
            raise UnsupportedError(
                f"{type(self.original_module).__name__} is trained in full (modules_to_save) and gives more than one "
                "tensor; it does not go into a batch of different adapters. Run one adapter a batch."
            )
        dtype = functools.reduce(torch.promote_types, (part.dtype for _, part in made))
        index, part = made[0]
        axes = len(index) if isinstance(index, tuple) else 1
        scattered = isinstance(index, tuple) and isinstance(index[0], torch.Tensor)
        result = part.new_zeros(*x.shape[:axes], *part.shape[1 if scattered else axes :], dtype=dtype)
        for index, part in made:
            result[index] = part.to(dtype)
        return result

    def call(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The module's output; its first input in its own dtype."""
        weight = next((p for p in module.parameters() if p.is_floating_point()), None)
        key, x = next(((k, v) for k, v in [*enumerate(args), *kwargs.items()] if torch.is_tensor(v)), (None, None))
        if weight is None or x is None or not x.is_floating_point() or torch.is_autocast_enabled(x.device.type):
            return module(*args, **kwargs)
        if isinstance(key, int):
            made = module(*args[:key], x.to(weight.dtype), *args[key + 1 :], **kwargs)
        else:
            made = module(*args, **kwargs | {str(key): x.to(weight.dtype)})
        return made.to(x.dtype) if self.keeps_dtype and torch.is_tensor(made) else made

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save", "switch", "active"):  # own, and not there yet
                raise
            try:
                active = self.active
            except CompositionError:  # of a pass: what is only looked at may be looked at
                active = self.original_module
            return getattr(active, name)


def part_of(value: Any, x: torch.Tensor, index: Any) -> Any:
    """The part of a call's arguments that goes with `x[index]`: of every tensor with x's rows (packed: and tokens)."""
    axes = 2 if isinstance(index, tuple) else 1
    if torch.is_tensor(value):
        return value[index] if value.shape[:axes] == x.shape[:axes] else value
    if type(value) in (list, tuple):
        return type(value)(part_of(v, x, index) for v in value)
    return {k: part_of(v, x, index) for k, v in value.items()} if type(value) is dict else value


def bare_copy(module: nn.Module) -> Any:
    """A copy of a module of the base, without what wrappers put around, into or merged into it; quantised layers in fp32."""
    inner = as_it_was(innermost(module))
    if quantized_kind(inner) is not None:
        return in_source_form(dequantized(inner, dequantize(inner))).float()
    made = copy.deepcopy(inner)
    for path, part in list(made.named_modules()):
        wrapped = hasattr(part, "base_layer") or hasattr(part, "original_module")
        if (wrapped or quantized_kind(part) is not None) and clean_path(path) == path:
            replace_module(made, path, bare_copy(part))
    return made


def find_modules(base: nn.Module, names: Sequence[str], wanted: Iterable[str]) -> dict[str, nn.Module]:
    """Modules whose dotted name ends with an entry of `names`: HF PEFT's rule, by which "classifier" is DistilBERT's
    `pre_classifier` as well. Entries of `wanted` must each match something.

    Raises:
        TargetError: an entry of `wanted` matches nothing.
    """
    if not all(names):
        raise TargetError(f"modules_to_save={list(names)!r}: an empty name would be every module.")
    modules = {n: m for n, m in base_modules(base) if n}
    found = {n: m for n, m in modules.items() if clean_path(n).endswith(tuple(names))}
    for entry in wanted:
        if not any(clean_path(n).endswith(entry) for n in found):
            leaves = sorted({n.rpartition(".")[2] for n in modules})
            raise TargetError(f"modules_to_save: no module of this model is called {entry!r}{nearest(entry, leaves)}")
    return {n: m for n, m in found.items() if not any(n.startswith(f"{o}.") for o in found)}


def save_modules(
    base: Any, switch: Switch, name: str, config: Any, dtype: torch.dtype | None, heads: Sequence[str] = ()
) -> None:
    """Give adapter `name` its own copies of the modules that its configuration trains in full; 16-bit floats become `dtype`.

    The task's head, `heads`, belongs to them, and is written into the configuration.
    """
    wanted = list(dict.fromkeys(getattr(config, "modules_to_save", None) or ()))
    entries = list(dict.fromkeys([*wanted, *heads]))
    if not entries:
        return
    config.modules_to_save = entries
    own = tuple(w for w in wanted if w not in heads)
    found = find_modules(base, entries, own)
    if heads and not own and not found:
        warnings.warn(
            f"task_type={config.task_type.value}: {type(base).__name__} has no module called "
            f"{' or '.join(heads)}; its head stays frozen. Name it in modules_to_save.",
            stacklevel=4,
        )
    containers = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
    for path, module in found.items():
        if isinstance(module, containers):
            raise KindError(
                f"modules_to_save selects {clean_path(path)!r}, a {type(module).__name__}: it is never called, only what is "
                "in it. Name the modules in it."
            )
    for path, module in found.items():
        if not isinstance(module, ModulesToSaveWrapper) or module.switch is not switch:
            module = ModulesToSaveWrapper(module, switch)
            replace_module(base, path, module)
        module.add(name, dtype)
        module.is_head = module.is_head or not clean_path(path).endswith(own)


def unsave_modules(base: nn.Module, switch: Switch, name: str) -> None:
    """Take adapter `name`'s copies away."""
    for path, module in list(base_modules(base)):
        if isinstance(module, ModulesToSaveWrapper) and module.switch is switch and name in module.modules_to_save:
            del module.modules_to_save[name]
            if not module.modules_to_save:
                replace_module(base, path, module.original_module)


def saved_modules(base: nn.Module, switch: Switch, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Adapter `name`'s copies with the dotted names of their places."""
    for path, module in base_modules(base):
        if isinstance(module, ModulesToSaveWrapper) and module.switch is switch and name in module.modules_to_save:
            yield clean_path(path), module.modules_to_save[name]
