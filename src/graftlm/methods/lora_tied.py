"""`ensure_weight_tying`: an adapter of tied input and output embeddings stays tied.

Shapes: H hidden size, V vocabulary. The embedding's update of the table [V, H] is ``scale * (B A)^T``, A [r, V], B [H, r];
the head's weight is the same table, and its update has the same factors the other way round, A' = B^T, B' = A^T.

What differs from HF PEFT: the head has no factors of its own, so that one gradient, of both uses, trains them (HF PEFT has
two views of one memory, which an optimiser steps one after the other: under plain SGD the same, under Adam not quite).
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import base_modules, clean_path, innermost, is_encoder_decoder, replace_module
from ..errors import UnsupportedError
from ..layers import Adapted, Frozen, Held, ModulesToSaveWrapper, save_modules
from .lora_change import LoraChange, Magnitude
from .targets import matches


class TiedChange(LoraChange):
    """Of a head whose weight is the embedding's. `source`: the embedding's tensors."""

    tables = ("lora_dropout", "lora_magnitude_vector")
    keys = ("lora_A.weight", "lora_B.weight")
    numbers = (*LoraChange.numbers, "lora_A", "lora_B")

    def __init__(self, config: Any, r: int, alpha: float, source: Held) -> None:
        super().__init__(config, r, alpha)
        self.source = source.layer, source.name

    def create(self, t: Held, frozen: Frozen, dtype: torch.dtype, initialise: bool) -> None:
        p = self.config.lora_dropout
        t["lora_dropout"] = nn.Dropout(p) if p > 0 else nn.Identity()
        if self.dora:
            t["lora_magnitude_vector"] = Magnitude(self.norm(t, frozen, torch.float32).to(dtype))

    def factors(self, t: Held) -> tuple[Tensor, Tensor]:
        held = Held(*self.source)
        return held["lora_embedding_B"].T, held["lora_embedding_A"].T

    @property
    def lora_A(self) -> SimpleNamespace:
        """Views of the embedding's factors by the names that a head of its own would have."""
        return SimpleNamespace(weight=Held(*self.source)["lora_embedding_B"].T)

    @property
    def lora_B(self) -> SimpleNamespace:
        return SimpleNamespace(weight=Held(*self.source)["lora_embedding_A"].T)

    def values(self, t: Held) -> list[nn.Parameter]:
        held = Held(*self.source)
        return [*super().values(t), held["lora_embedding_A"], held["lora_embedding_B"]]


def tied_pair(host: Any) -> tuple[tuple[str, Any], tuple[str, Any]] | None:
    """Input embeddings and head where they share their weight, each with the dotted path of where it stands now."""
    base = host.base
    found = [getattr(base, f"get_{name}_embeddings", lambda: None)() for name in ("input", "output")]
    if found[0] is None:
        return None
    own: list[Any] = [m if m is None else innermost(m) for m in found]
    weight = own[0]._parameters.get("weight")
    if own[1] is None:  # a model that does not say which its head is
        modules = (innermost(m) for _, m in base_modules(base))
        own[1] = next((m for m in modules if isinstance(m, nn.Linear) and m._parameters.get("weight") is weight), None)
    if own[0] is own[1] or own[1] is None or own[1]._parameters.get("weight") is not weight:
        return None
    paths = {id(innermost(m)): (path, m) for path, m in reversed(list(base_modules(base)))}  # the outermost last
    return paths[id(own[0])], paths[id(own[1])]


def tie_targets(host: Any, name: str, config: Any) -> tuple[str, str] | None:
    """Where `config` asks for it and selects one of them, embeddings and head: the embedding is put among
    `target_modules`, the head taken out. Returns their dotted names in the bare base."""
    if not config.ensure_weight_tying:
        report_tied(host.base, config)
        return None
    if is_encoder_decoder(host.base):
        if config.trainable_token_indices is not None and not names_embeddings(host.base, config):
            return None  # rows of tokens are tied wherever they are
        raise UnsupportedError("ensure_weight_tying is for decoder-only and encoder-only models.")
    pair = tied_pair(host)
    if pair is None:
        warnings.warn("ensure_weight_tying=True: this model has no tied embeddings and head; nothing to tie.", stacklevel=4)
        return None
    embedding, head = (clean_path(path) for path, _ in pair)
    targets, saved = config.target_modules, config.modules_to_save or ()
    if saved and any(path.endswith(tuple(saved)) for path in (embedding, head)):
        tie_copies(host, name, config, pair)
        return None
    if not any(matches(targets, path) for path in (embedding, head)):
        if config.trainable_token_indices is not None:
            return None
        warnings.warn(
            "ensure_weight_tying=True: neither target_modules nor modules_to_save name the embeddings or the head; nothing "
            "to tie.",
            stacklevel=4,
        )
        return None
    if isinstance(targets, str):
        config.target_modules = targets if matches(targets, embedding) else f"(?:{targets})|(?:{embedding})"
    else:
        kept = [t for t in targets if not matches([t], head)]
        config.target_modules = kept if matches(kept, embedding) else [*kept, embedding]
    return embedding, head


def report_tied(base: Any, config: Any) -> None:
    """A warning where an adapter changes, or trains in full, modules that share their weight with an embedding."""
    shared: dict[int, dict[str, nn.Module]] = {}
    for path, module in base_modules(base):
        if (weight := module._parameters.get("weight")) is not None:
            shared.setdefault(id(weight), {})[clean_path(path)] = module
    targets, saved = config.target_modules, tuple(config.modules_to_save or ())
    for group in shared.values():
        if len(group) < 2 or not any(isinstance(m, nn.Embedding) for m in group.values()):
            continue
        named = [path for path in group if matches(targets, path) or path.endswith(saved)]
        if named:
            way = "" if is_encoder_decoder(base) else " ensure_weight_tying=True changes them alike."
            warnings.warn(
                f"target_modules or modules_to_save name {', '.join(named)}: {', '.join(group)} share one weight, but only "
                f"what is named is changed, each by itself, and merged they have weights of their own.{way}",
                stacklevel=5,
            )


def names_embeddings(base: Any, config: Any) -> bool:
    """Whether `target_modules` or `modules_to_save` select a module that shares the input embeddings' weight."""
    weight = innermost(base.get_input_embeddings())._parameters.get("weight")
    tied = [clean_path(path) for path, m in base_modules(base) if innermost(m)._parameters.get("weight") is weight]
    saved = tuple(config.modules_to_save or ())
    return any(matches(config.target_modules, path) or path.endswith(saved) for path in tied)


def tie_head(host: Any, name: str, config: Any, pair: tuple[str, str], rank: tuple[int, float], dtype: torch.dtype) -> None:
    """Give the head the change that goes with the embedding's."""
    places: dict[str, tuple[str, Any]] = {
        clean_path(path): (path, module) for path, module in reversed(list(base_modules(host.base)))
    }
    layer: Any = places[pair[0]][1]
    path, head = places[pair[1]]
    while layer.switch is not host.switch:
        layer = layer.base_layer
    own = isinstance(head, Adapted) and head.switch is host.switch
    adapted: Any = head if own else Adapted(head, host.switch)
    if not own:
        replace_module(host.base, path, adapted)
    if name in adapted.changes:  # an expression selected it
        adapted.remove(name)
    adapted.add(name, TiedChange(config, *rank, layer.held(name)), dtype)


def tie_copies(host: Any, name: str, config: Any, pair: Any) -> None:
    """Of embeddings and head that an adapter trains in full (`modules_to_save`): one weight for both copies."""
    missing = [
        clean_path(path) for path, m in pair if not (isinstance(m, ModulesToSaveWrapper) and name in m.modules_to_save)
    ]
    half = host._float_dtype() in (torch.float16, torch.bfloat16) and host.autocast_adapter_dtype
    wanted: Any = SimpleNamespace(modules_to_save=missing, task_type=config.task_type)
    save_modules(host.base, host.switch, name, wanted, torch.float32 if half else None)
    config.modules_to_save = list(dict.fromkeys([*config.modules_to_save, *missing]))
    embedding, head = (m for _, m in tied_pair(host))  # type: ignore[union-attr]
    head.modules_to_save[name].weight = embedding.modules_to_save[name].weight
