"""Which modules of a base model a configuration's patterns name.

The rules are HF PEFT's: a list entry matches a module whose dotted name is the entry or ends with `.entry`; a string is
a regular expression that must match the whole name; `"all-linear"` is every linear layer but the output head. What is
not HF PEFT's: an entry that selects nothing is named in a warning, with its nearest modules.
"""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from ..architectures import clean_path, innermost
from ..errors import TargetError, nearest
from ..layers import is_product
from .base import TaskType

ALL_LINEAR = "all-linear"
SEQ_CLS_HEADS = ("score", "classifier")


def matches(patterns: str | Iterable[str] | None, name: str) -> bool:
    """Whether a module's dotted name is meant by `patterns` (a regular expression, or a list of endings)."""
    if not patterns:
        return False
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == p or name.endswith(f".{p}") for p in patterns)


def pattern_value(table: dict[str, Any], name: str, default: Any) -> Any:
    """The entry of `rank_pattern`/`alpha_pattern` for a module: keys are names or regular expressions."""
    for key, value in (table or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def layer_index(name: str, layers_pattern: str | Sequence[str] | None) -> int | None:
    """Number of the layer that a module belongs to: `model.layers.3.mlp.fc1` -> 3."""
    if not layers_pattern:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", name) or re.match(r"[^.]*\.(\d+)\.", name)  # of a bare backbone
        return int(found[1]) if found else None
    for pattern in [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern:
        if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name):
            return int(found[1])
    return None


def find_targets(base: nn.Module, config: Any, skip: tuple[type, ...] = ()) -> dict[str, nn.Module]:
    """Modules that `config.target_modules` and its companions select: dotted name -> module.

    Names are those of the base as it stands; patterns see them as they are in the bare base (a module that another adapter
    trains in full stands in a container there, as `original_module`).

    As with HF PEFT an entry that is a module's whole name selects it whatever `layers_to_transform` says (`lm_head` is in
    no layer). `skip` names container classes whose inside belongs to adapters and is not searched.

    Raises:
        TargetError: nothing matches.
    """
    places = module_names(base, skip)
    names = {clean_path(place): module for place, module in places.items()}
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        targets = linear_names(base, names, config)
        report_experts(names, config)
    chosen = {n: m for n, m in names.items() if matches(targets, n)}
    found = {n: m for n, m in chosen.items() if lets_in(config, targets, n)}
    if not found:
        raise TargetError(no_match(targets, names, config))
    if not isinstance(targets, str):
        report_unmatched(targets, names, chosen, found)
    report_unused(config, list(chosen), list(found))
    return {place: module for place, module in places.items() if clean_path(place) in found}


def lets_in(config: Any, targets: str | Iterable[str], name: str) -> bool:
    """Whether a module that `targets` match is among those that a configuration's other fields leave in."""
    if matches(config.exclude_modules, name) or is_reserved(name, config):
        return False
    return isinstance(targets, str) or name in targets or in_layers(name, config)


def is_reserved(name: str, config: Any) -> bool:
    """Whether a module is, or lies in, one that is trained in full (`modules_to_save`)."""
    return any(re.match(rf".*{re.escape(m)}($|\.)", name) for m in config.modules_to_save or ())


def in_layers(name: str, config: Any) -> bool:
    """Whether `layers_to_transform` lets this module in."""
    wanted = getattr(config, "layers_to_transform", None)
    if wanted is None or (isinstance(wanted, (list, tuple)) and not wanted):
        return True
    index = layer_index(name, config.layers_pattern)
    return index is not None and (index == wanted if isinstance(wanted, int) else index in wanted)


def module_names(base: nn.Module, skip: tuple[type, ...]) -> dict[str, nn.Module]:
    """Dotted names of the base's own modules: the inside of adapter containers is left out, the containers stay. Of those
    that hold copies which are trained in full, the original stands for them."""
    names: dict[str, nn.Module] = {}

    def collect(module: nn.Module, path: str) -> None:
        for name, child in module._modules.items():
            if name == "parametrizations":  # torch's, of a weight that is computed
                continue
            while child is not None and "original_module" in child._modules:
                name, child = f"{name}.original_module", child._modules["original_module"]
            if child is not None:
                names[path + name] = child
                if not isinstance(child, skip):
                    collect(child, f"{path}{name}.")

    collect(base, "")
    return names


def linear_names(base: Any, names: dict[str, nn.Module], config: Any) -> list[str]:
    """Every linear layer's full name, without the output embeddings and without heads that are trained in full; of torch's
    MultiheadAttention without `out_proj`, which is never called."""
    head = innermost(getattr(base, "get_output_embeddings", lambda: None)())
    found = []
    for name, module in names.items():
        is_head = innermost(module) is head
        classifies = config.task_type == TaskType.SEQ_CLS and name.rpartition(".")[2] in SEQ_CLS_HEADS
        classifies = classifies or is_reserved(name, config)
        if is_linear(module) and not is_head and not classifies and not is_uncalled(module):
            found.append(name)
    return found


def report_experts(names: dict[str, nn.Module], config: Any) -> None:
    """A warning where "all-linear" leaves out experts, whose weights are stacked in parameters of their module."""
    found = [
        f"experts.{key}"
        for name, module in names.items()
        if name.rpartition(".")[2] == "experts"
        for key, value in module._parameters.items()
        if value is not None and value.dim() == 3
    ]
    if found and not getattr(config, "target_parameters", None):
        warnings.warn(
            "target_modules='all-linear' takes linear layers only; this model's experts are stacked in parameters, which "
            f"stay as they are. LoRA changes them with target_parameters={list(dict.fromkeys(found))}.",
            stacklevel=2,
        )


def report_unmatched(
    targets: Iterable[str], names: dict[str, nn.Module], chosen: dict[str, nn.Module], found: dict[str, nn.Module]
) -> None:
    """One warning that names each entry which selects no module, with the nearest module names or what left it out."""
    missing = [t for t in targets if not any(matches([t], name) for name in chosen)]
    left_out = [t for t in targets if t not in missing and not any(matches([t], name) for name in found)]
    texts = []
    if missing:
        leaves = linear_leaves(names)
        listed = ", ".join(
            f"{t!r}{nearest(t, leaves, cutoff=0.4).replace('; did', ' (did').replace('?', '?)')}" for t in missing
        )
        texts.append(f"no module of this model matches {listed}.")
    if left_out:
        texts.append(
            f"what matches {', '.join(repr(t) for t in left_out)} is left out (by layers_to_transform, by exclude_modules, "
            "or trained in full: modules_to_save)."
        )
    if texts:
        warnings.warn(
            f"target_modules: {' '.join(texts)} The other entries were used. {called(names)}.",
            stacklevel=2,
        )


def report_unused(config: Any, chosen: list[str], found: list[str]) -> None:
    """A warning that names layer numbers and exclusions that select none of the targets, and one of such patterns."""
    unused = []
    wanted = getattr(config, "layers_to_transform", None)
    for number in [wanted] if isinstance(wanted, int) else wanted or ():
        if number not in {layer_index(name, config.layers_pattern) for name in found}:
            unused.append(f"layers_to_transform: {number}{' (layers are counted from 0)' if number < 0 else ''}")
    leaves = sorted({n.rpartition(".")[2] for n in chosen})
    exclusions = config.exclude_modules
    if isinstance(exclusions, str) and not any(matches(exclusions, n) for n in chosen):
        unused.append(f"exclude_modules: the expression {exclusions!r}{as_list(exclusions, chosen)}")
    for entry in () if isinstance(exclusions, str) else exclusions or ():
        if not any(matches([entry], n) for n in chosen):
            unused.append(f"exclude_modules: {entry!r}{nearest(entry, leaves, cutoff=0.4)}")
    patterns = []
    if not getattr(config, "target_parameters", None):  # else patterns may be of parameters, which are looked for later
        patterns = unused_patterns(config, found, leaves)
    kinds = [(unused, UserWarning), (patterns, RuntimeWarning)]  # HF PEFT's
    for entries, kind in kinds:
        if entries:
            text = "These entries select none of the target modules and have no effect: "
            warnings.warn(text + ", ".join(entries), kind, stacklevel=2)


def unused_patterns(config: Any, found: list[str], leaves: list[str]) -> list[str]:
    """Keys of rank and alpha patterns that match none of the names found, each with those of `leaves` that are near."""
    return [
        f"{title}: {key!r}{nearest(key, leaves, cutoff=0.4) if key not in leaves else ''}"
        for title in ("rank_pattern", "alpha_pattern")
        for key, value in (getattr(config, title, None) or {}).items()
        if not isinstance(value, list)  # AdaLoRA's: which ranks are left
        and not any(pattern_value({key: True}, name, False) for name in found)
    ]


def as_list(expression: str, names: Iterable[str]) -> str:
    """A hint where a regular expression would match as the entry of a list."""
    return f"; for modules of that name write [{expression!r}]" if any(matches([expression], n) for n in names) else ""


def linear_leaves(names: dict[str, nn.Module]) -> list[str]:
    """Last parts of the linear layers' names, sorted."""
    return sorted({n.rpartition(".")[2] for n, m in names.items() if is_linear(m)})


def called(names: dict[str, nn.Module]) -> str:
    """What the layers that can be targets are called."""
    if leaves := linear_leaves(names):
        return f"Its linear layers are called {', '.join(leaves)}"
    others = (nn.modules.conv._ConvNd, nn.MultiheadAttention, nn.Embedding)
    found = sorted({n.rpartition(".")[2] for n, m in names.items() if isinstance(frozen_layer(m), others)})
    return "It has no linear layers" + (f"; others are called {', '.join(found)}" if found else "")


def frozen_layer(module: Any) -> Any:
    """A module of the base, itself or inside adapter modules."""
    return getattr(getattr(module, "frozen", None), "layer", module)


def is_linear(module: Any) -> bool:
    """Whether a module is a linear layer, itself or inside adapter modules, and computes as such."""
    return isinstance(layer := frozen_layer(module), (nn.Linear, Conv1D)) and is_product(layer)


def is_uncalled(module: Any) -> bool:
    """Whether a module is the `out_proj` of torch's MultiheadAttention, which reads its weight and never calls it."""
    return isinstance(frozen_layer(module), NonDynamicallyQuantizableLinear)


def report_read(base: nn.Module, targets: Iterable[str]) -> None:
    """A warning for layers whose weight the code of their module reads without calling them: a change of them would not act,
    nor be trained, until it is merged."""
    found: dict[str, list[str]] = {}
    for path in targets:
        place, _, name = path.removesuffix(".original_module").rpartition(".")
        cls: Any = type(base.get_submodule(place))
        if where := read_by_weight(cls, name):
            found.setdefault(where, []).append(clean_path(path))
    for where, paths in found.items():
        leaves = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in paths))
        warnings.warn(
            f"target_modules: {where} this model's code reads the weight of {leaves} ({paths[0]!r}; {len(paths)} in all) "
            "and does not call the layer: there changes of it do not act and are not trained. Leave it out.",
            stacklevel=2,
        )


@functools.cache
def read_by_weight(cls: type, name: str) -> str:
    """Where the code of a class reads the weight of its layer `name` instead of calling it: "everywhere" (WavLM's
    attention), "with Mamba's kernels, on GPUs,", or "" for nowhere."""
    source = source_of(cls)
    if not re.search(rf"\bself\.{name}\.weight\b(?!\.(dtype|device|shape|data|size))", source):
        return ""
    if not re.search(rf"\bself\.{name}\(", source):
        return "everywhere"
    return "with Mamba's kernels, on GPUs," if re.search("causal_conv1d|mamba_", source) else ""


@functools.cache
def source_of(cls: type) -> str:
    """The code of a module's class and of those it is made of, as far as it can be read; "" for torch's."""
    found = []
    for part in cls.__mro__:
        if part.__module__.partition(".")[0] in ("torch", "builtins") or part.__module__ == "transformers.modeling_utils":
            continue
        try:
            found.append(inspect.getsource(part))
        except (OSError, TypeError):  # made in an interpreter, or compiled
            return ""
    return "\n".join(found)


def without_uncalled(config: Any, found: dict[str, nn.Module], all_of_them: bool = False) -> dict[str, nn.Module]:
    """The targets without each `out_proj` of a MultiheadAttention that an entry selects beside layers which are called (with
    `all_of_them`, of a file, by itself as well), and without those whose attention is a target."""
    uncalled = {clean_path(path) for path, module in found.items() if is_uncalled(module)}
    called = [clean_path(path) for path in found if clean_path(path) not in uncalled]
    targets = config.target_modules
    entries = [targets] if isinstance(targets, str) else [[entry] for entry in targets]
    beside = [
        n for n in uncalled if all_of_them or any(matches(e, n) and any(matches(e, c) for c in called) for e in entries)
    ]
    if alone := sorted(n for n in beside if n.rpartition(".")[0] not in called):
        warnings.warn(
            f"target_modules: {', '.join(alone)} is left out: torch's MultiheadAttention reads its weight without calling "
            f"it. Name {alone[0].rpartition('.')[0]!r} to change it along with the attention.",
            stacklevel=2,
        )
    left = {p: m for p, m in found.items() if clean_path(p) not in beside}
    return {p: m for p, m in left.items() if not is_uncalled(m) or p.rpartition(".")[0] not in left}


def no_match(targets: Any, names: dict[str, nn.Module], config: Any) -> str:
    """The text for a selection that is empty."""
    entries = [targets] if isinstance(targets, str) else list(targets or [])
    leaves = linear_leaves(names)
    if isinstance(targets, str):
        text = f"target_modules={targets!r}, an expression for whole module names, matches no module of this model"
    else:
        text = f"target_modules={entries!r} matches no module of this model"
    if getattr(config, "layers_to_transform", None) is not None:
        text += f" within layers_to_transform={config.layers_to_transform!r}"
    if config.exclude_modules:
        text += f" outside exclude_modules={config.exclude_modules!r}"
    if any(matches(targets, n) and is_reserved(n, config) for n in names):
        text += f" outside modules_to_save={config.modules_to_save!r}, which are trained in full"
    if isinstance(targets, str) and (hint := as_list(targets, names)):
        text += hint
    elif len(entries) == 1 and entries[0] not in leaves:
        text += nearest(entries[0], leaves)
    return f"{text}. {called(names)}" + ("; 'all-linear' takes all of them." if leaves else ".")
