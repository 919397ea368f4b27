"""Walking a base without walking through its adapters, so that what is asked of a base costs the same with a hundred."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

# Modules that stand in a layer's place, and what of them belongs to the base; the rest is adapters', by name.
_INNER = ("base_layer", "original_module")
_AROUND = (*_INNER, "_orig_mod")  # torch.compile's


def innermost(module: Any) -> Any:
    """The base's own module inside all that was put around it: adapters in a layer's place; around a model a wrapper with
    adapters (HF PEFT's as well), torch.compile, or what shares its batches among processes or GPUs."""
    while isinstance(module, nn.Module):
        children = module._modules
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif hasattr(type(module), "get_base_model"):
            module = module.get_base_model()  # type: ignore[operator]
        elif (inner := next((n for n in _AROUND if n in children), None)) is not None:
            module = children[inner]
        else:
            break
    return module


def base_modules(root: nn.Module, path: str = "", seen: set[nn.Module] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """As `root.named_modules()`, but of a module that carries adapters only the layer that it stands for is entered."""
    seen = set() if seen is None else seen
    if root in seen:
        return
    seen.add(root)
    yield path, root
    children = root._modules
    inner = next((n for n in _INNER if n in children), None)
    for name, child in children.items() if inner is None else [(inner, children[inner])]:
        if child is not None:
            yield from base_modules(child, f"{path}.{name}" if path else name, seen)


def held_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Of a module that stands in a layer's place, the parameters that are adapters'; none of any other module."""
    if any(name in module._modules for name in _INNER):
        yield from module.parameters(recurse=False)
        for name, child in module._modules.items():
            if name not in _INNER and child is not None:
                yield from child.parameters()


def clean_path(path: str) -> str:
    """A module's dotted name in the bare base, whatever adapter modules it stands in now."""
    return re.sub(r"\.(base_layer|original_module)(?=\.|$)", "", path)


def replace_module(root: nn.Module, path: str, new: nn.Module) -> None:
    """Put `new` at the dotted `path` below `root`."""
    parent, _, name = path.rpartition(".")
    owner = root.get_submodule(parent) if parent else root
    setattr(owner, name, new)
