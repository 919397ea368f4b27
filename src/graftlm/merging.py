"""Adapters folded into the base, and combined with each other."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import AdapterSet
from .architectures import base_modules, clean_path, innermost, replace_module
from .errors import AdapterError, UnsupportedError
from .layers import Adapted, ModulesToSaveWrapper, adapted_layers, saved_modules
from .methods.lora import LoraConfig
from .methods.lora_combine import all_ids, check_layer, check_options, combine, new_rank, parted
from .modes import evaluating
from .quantization import DequantizedConv1D, DequantizedLinear, holds_quantized, in_source_form, quantized_kind
from .routing import Plan, running


def merge(host: AdapterSet, names: list[str], *, safe: bool, keep: bool, requantize: bool) -> None:
    """Fold adapters into the layers that they change; what that does to quantised ones is printed.

    Args:
        safe: refuse weights that become infinite or NaN.
        keep: what is needed for `unmerge`; without it there is no way back.
        requantize: quantise a quantised layer anew.

    Raises:
        ValueError: with `safe`, a weight would be NaN or infinite; nothing is changed.
    """
    check_mergeable(host, names)
    with drift_printed(host, names, requantize):
        layers = [layer for _, layer in adapted_layers(host.base, host.switch)]
        if safe and not all(layer.finite(names) for layer in layers):
            raise ValueError(f"Merging {', '.join(names)} gives NaN or infinite weights; nothing was changed.")
        if keep and any(layer.merged for layer in layers) and all(layer.holds(names) for layer in layers):
            warnings.warn(f"{', '.join(names)}: all of it is merged already; nothing is done.", stacklevel=4)
            return
        if not keep:
            merge_biases(host, names)
        for layer in layers:
            layer.merge(names, requantize=requantize)
            if not keep:
                layer.frozen.forget()
        follow(host)


def merge_active(host: AdapterSet, names: list[str], *, safe: bool, requantize: bool) -> None:
    """`merge`, reversibly, after which these adapters are active: merged or not, the active ones are those that act."""
    before = host.switch.active
    if not set(names) <= set(before):
        merged = {n for layer in merged_layers(host) for n in layer.merged_adapters}
        active = tuple(dict.fromkeys([*(n for n in before if n in merged or n in names), *names]))
        host._refuse_together(active)
        host.switch.active = active
    try:
        merge(host, names, safe=safe, keep=True, requantize=requantize)
    except Exception:
        host.switch.active = before
        raise
    if host.switch.active != before:
        first = host.active_before[0] if host.active_before is not None else before
        host.active_before = first, host.switch.active
    if lost := [n for n in before if n not in host.switch.active]:
        warnings.warn(
            f"{', '.join(lost)} acts no longer: merge_adapter({names}) has made what it merges active. To have both, call "
            f"set_adapter({[*before, *names]}) first.",
            stacklevel=3,
        )


def active_as_before(host: AdapterSet) -> None:
    """What merging made active is so no longer, unless others were made active since."""
    if host.active_before is not None and host.active_before[1] == host.switch.active:
        host.switch.active = tuple(n for n in host.active_before[0] if n in host.methods)
    host.active_before = None


def check_mergeable(host: AdapterSet, names: list[str]) -> None:
    """UnsupportedError for methods that are no change of weights."""
    for name in names:
        if not host.methods[name].mergeable:
            kind = host.methods[name].config.peft_type
            raise UnsupportedError(
                f"Adapter {name!r} is {getattr(kind, 'value', kind)}: it is no change of weights, so it cannot be "
                "merged. Keep it attached."
            )
        host.methods[name].refuse_merge(host)
    for _, layer in adapted_layers(host.base, host.switch):
        layer.check_merge(names)


def unmerge(host: AdapterSet, *names: str) -> None:
    """Take adapters (all) out of the base weights; what else is merged stays so."""
    changed = False
    for layer in merged_layers(host):
        for name in [n for n in names if n in layer.merged_adapters] if names else [None]:
            layer.unmerge(name)
            changed = True
    if changed:
        follow(host)


def merged_layers(host: AdapterSet) -> list[Any]:
    own = [m for _, m in base_modules(host.base) if getattr(m, "switch", None) is host.switch]
    return [m for m in own if getattr(m, "merged_adapters", None)]


def follow(host: AdapterSet) -> None:
    """Layers were replaced by a merge or its undoing: the hooks that stood on them follow."""
    host._disconnect()  # a layer may have got another form beside it, on which hooks stand too
    host._connect()
    host._reconnect_others()


def merge_and_unload(host: AdapterSet, safe: bool, names: list[str] | None, requantize: bool = False) -> nn.Module:
    """The base with adapters folded in. Weights that were tied and now differ are untied, in the configuration too; those
    that have changed alike (trained tokens) stay tied."""
    names = list(names or host.active_adapters)
    host._known(*names)
    check_mergeable(host, names)
    host._refuse_together(names)
    unmerge(host)
    with others_lifted(host):
        tied = untie(host, names)
        merge(host, names, safe=safe, keep=False, requantize=requantize)
        put_saved(host, names)
        for path, layer in reversed(list(adapted_layers(host.base, host.switch))):  # those inside of others first
            inner = in_source_form(layer.leave_place())
            if not isinstance(inner, Adapted):
                layer.frozen.layer = inner
            replace_module(host.base, path, inner)
        tie_equal(host, tied)
        describe_quantization(host.base, host._float_dtype())
        if any(getattr(host.peft_config[n], "ensure_weight_tying", False) for n in names):
            host.base.tie_weights()  # the two halves were merged alike
    for part in (host.prompt_encoder, host.bottleneck, host.adapter_biases):
        part.clear()
    host.methods.clear()
    host.configs.clear()
    host.switch.active = ()
    host._forget()
    return host.base


@contextmanager
def others_lifted(host: AdapterSet) -> Iterator[None]:
    """Within the block no other wrapper's adapters are in the base's weights."""
    adapted = (m for _, m in base_modules(host.base) if isinstance(m, Adapted) and m.switch is not host.switch)
    merged = [(layer, layer.merged_adapters) for layer in adapted if layer.merged]
    for layer, _ in merged:
        layer.unmerge()
    try:
        yield
    except Exception:
        merge_again(merged)
        if merged:
            follow(host)
        raise
    merge_again(merged)


def merge_again(layers: list[tuple[Adapted, list[str]]]) -> None:
    """Adapters that were lifted out of layers are put in again."""
    for layer, names in layers:
        layer.merge(names, requantize=layer.frozen.requantize)


def put_saved(host: AdapterSet, names: list[str]) -> None:
    """The copies of modules that adapters have trained in full take the modules' places."""
    for path, module in list(base_modules(host.base)):
        if isinstance(module, ModulesToSaveWrapper) and module.switch is host.switch:
            kept = [n for n in names if n in module.modules_to_save]
            if len(kept) > 1:
                raise AdapterError(f"Adapters {', '.join(kept)} each bring their own copy of {path}; merge one of them.")
            merged = module.modules_to_save[kept[0]] if kept else module.original_module
            quantised = holds_quantized(module.original_module)
            dtypes = (p.dtype for p in module.original_module.parameters())
            dtype = host._float_dtype() if quantised else next(dtypes, None)
            replace_module(host.base, path, merged.to(dtype) if kept and dtype is not None else merged)


@contextmanager
def drift_printed(host: AdapterSet, names: list[str], requantize: bool) -> Iterator[None]:
    """Around a merge: prints by how much the logits of a fixed probe move, where quantised layers are changed."""
    kinds = Counter(
        quantized_kind(layer.frozen.layer)
        for _, layer in adapted_layers(host.base, host.switch)
        if any(n in layer.changes for n in names)
    )
    kinds.pop(None, None)
    names = list(dict.fromkeys([n for layer in merged_layers(host) for n in layer.merged_adapters] + names))
    before = probe_logits(host, names) if kinds else None
    yield
    if before is None:
        return
    after: Any = probe_logits(host, names)
    moved, largest = (after - before).abs().max().item(), before.abs().max().item()
    same = (after.argmax(-1) == before.argmax(-1)).float().mean().item()
    layers = " and ".join(f"{count} {kind} layers" for kind, count in kinds.items())
    how = "were quantised anew with the adapter in them" if requantize else "became bfloat16 copies with the adapter in them"
    print(f"merge: {layers} {how}.")
    print(f"merge: logits move by up to {moved:.3g} (largest {largest:.3g}); {same:.0%} of the likeliest tokens stay.")


def probe_logits(host: AdapterSet, names: list[str]) -> Tensor | None:
    """Logits (or last hidden states) of 32 fixed token ids under some adapters, fp32; None for a base without token ids."""
    if host.plain:
        return None
    config = host.base.config
    size = getattr(config.get_text_config(), "vocab_size", None)
    if size is None:
        return None
    ids = torch.randint(0, size, (1, 32), generator=torch.Generator().manual_seed(0)).to(host.adapter_device)
    more = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
    with evaluating(host.base), torch.no_grad(), running(Plan(host.switch, tuple(names))):
        return host.base(input_ids=ids, **more)[0].float()


def describe_quantization(base: Any, dtype: torch.dtype) -> None:
    """Let a base's configuration say which of its layers are still quantised, so that it can be saved and loaded.

    Beside quantised layers transformers loads every weight as it was saved: there the copies take the activations' dtype.
    """
    if getattr(base, "hf_quantizer", None) is None:
        return
    base._weight_conversions = None  # a checkpoint saved quantised brings steps that transformers cannot take back in saving
    if holds_quantized(base):
        settings = base.config.quantization_config
        plain = {n: m.to(dtype) for n, m in base.named_modules() if isinstance(m, (DequantizedLinear, DequantizedConv1D))}
        if hasattr(settings, "llm_int8_skip_modules"):
            kept = settings.llm_int8_skip_modules or base.hf_quantizer.modules_to_not_convert or ()
            settings.llm_int8_skip_modules = list(dict.fromkeys([*kept, *plain]))
        return
    del base.config.quantization_config
    base.hf_quantizer, base.is_quantized, base.quantization_method = None, False, None
    for flag in ("is_loaded_in_8bit", "is_loaded_in_4bit"):
        if hasattr(base, flag):
            setattr(base, flag, False)


def merge_biases(host: AdapterSet, names: list[str]) -> None:
    """Trained biases become the modules' own."""
    for name in names:
        if name not in host.adapter_biases:
            continue
        for key, bias in host.adapter_biases[name].items():
            module = innermost(host.base.get_submodule(key.replace("/", ".")))
            module.bias.data = bias.detach().to(module.bias.dtype)


def untie(host: AdapterSet, names: list[str]) -> list[list[str]]:
    """Give every module of a tied group its own weight when merging changes some of them; returns these groups by path."""
    base = host.base
    groups: dict[int, dict[str, nn.Module]] = {}
    for path, module in base_modules(base):
        if module._parameters.get("weight") is not None:
            groups.setdefault(id(module._parameters["weight"]), {})[clean_path(path)] = module
    changed = {id(innermost(m)) for m in base.modules() if changes(host, m, names)}
    split = [
        g
        for g in groups.values()
        if len(g) > 1 and any(id(m) in changed for m in g.values()) and not tied_alike(host, list(g.values()), names)
    ]
    for modules in split:
        for module in list(modules.values())[1:]:
            module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)  # type: ignore[operator, union-attr]
    return [list(modules) for modules in split]


def tie_equal(host: AdapterSet, groups: list[list[str]]) -> None:
    """Modules of a group, by path, whose weights are all equal share one again; else the configuration says they do not."""
    base = host.base
    own = () if host.plain else (base.config, base.config.get_text_config())
    for first, *others in ([base.get_submodule(path) for path in group] for group in groups):
        if all(same(module.weight, first.weight) for module in others):
            for module in others:
                module.weight = first.weight
            continue
        for config in {id(c): c for c in own}.values():
            config.tie_word_embeddings = False


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def tied_alike(host: AdapterSet, modules: list[nn.Module], names: list[str]) -> bool:
    """Whether adapters change modules of one weight all alike, so that they can share it afterwards."""
    own = {id(m) for m in modules}
    around = [m for m in host.base.modules() if id(innermost(m)) in own]
    return all(
        getattr(host.peft_config[name], "ensure_weight_tying", False)
        for name in names
        if any(changes(host, module, [name]) for module in around)
    )


def changes(host: AdapterSet, module: nn.Module, names: list[str]) -> bool:
    """Whether merging `names` changes this module's weight."""
    if isinstance(module, Adapted):
        return any(n in module.changes for n in names)
    return isinstance(module, ModulesToSaveWrapper) and any(n in module.modules_to_save for n in names)


def add_weighted_adapter(
    host: AdapterSet,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    **ignored: Any,
) -> None:
    """Add a LoRA adapter that combines others.

    Args:
        adapters, weights: the sources and their weights (negative ones subtract).
        adapter_name: name of the new adapter; it is not activated.
        combination_type: "linear", "cat" (exact, ranks add up), "svd", "ties", "dare_linear", "dare_ties",
            "magnitude_prune", and these four with "_svd". All but "cat" and those with "svd" need sources of one rank in
            each layer that they share.
        svd_rank, svd_clamp: rank of the result, and the quantile that values are clamped to, for those with "svd".
        density: share of values that is kept, for ties, dare and magnitude_prune.
        majority_sign_method: "total" or "frequency", for ties.

    Raises:
        AdapterError: unknown or unsuitable adapters. ConfigError: impossible options. Nothing is changed then.
    """
    unknown = set(ignored) - {"svd_full_matrices", "svd_driver"}
    if unknown:
        raise TypeError(f"unexpected keyword arguments {sorted(unknown)}")
    if isinstance(adapters, str) or not isinstance(weights, Sequence):
        raise AdapterError(f"adapters={adapters!r}, weights={weights!r}: expected two lists, one weight an adapter.")
    host._known(*adapters)
    configs = [host.peft_config[n] for n in adapters]
    if len(adapters) != len(weights) or not adapters:
        raise AdapterError(f"{len(adapters)} adapters and {len(weights)} weights: expected one weight an adapter.")
    for name, config in zip(adapters, configs, strict=True):
        if type(config) is not LoraConfig:
            raise AdapterError(f"Adapter {name!r} is {config.peft_type.value}; only LoRA adapters can be combined.")  # type: ignore[union-attr]
        if any(saved_modules(host.base, host.switch, name)) or config.bias != "none":
            raise AdapterError(f"Adapter {name!r} trains whole modules or biases, which cannot be combined.")
    kind = "linear" if len(adapters) == 1 else combination_type
    options: dict[str, Any] = {"svd_clamp": svd_clamp, "density": density, "majority_sign_method": majority_sign_method}
    check_options(kind, weights, svd_rank=svd_rank, **options)
    everywhere: dict[str, Adapted] = {p: m for n in adapters for p, m in host.methods[n].layers(host)}  # type: ignore[attr-defined]
    layers, tokens = parted(everywhere, adapters)
    for path, layer in layers.items():
        check_layer(path, layer, adapters, kind)
    rank = new_rank(kind, list(layers.values()), adapters, svd_rank)
    biased = any(config.lora_bias for config in configs)  # type: ignore[attr-defined]
    config = replace(
        configs[0], r=rank, lora_alpha=rank, target_modules=list(layers), rank_pattern={}, alpha_pattern={},
        use_rslora=False, lora_bias=biased, layers_to_transform=None, layers_pattern=None, exclude_modules=None,
        trainable_token_indices={path: all_ids(layer, adapters) for path, layer in tokens.items()} or None,
    )  # type: ignore[call-arg]  # fmt: skip
    host.add_adapter(adapter_name, config)
    try:
        for _, layer in host.methods[adapter_name].layers(host):  # type: ignore[attr-defined]
            combine(layer, adapter_name, adapters, weights, kind, **options)
    except Exception:
        host.delete_adapter(adapter_name)
        raise
