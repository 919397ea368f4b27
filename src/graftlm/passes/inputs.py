"""The arguments of a base's forward, by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from torch import Tensor
from transformers import Cache


def by_name(signature: inspect.Signature, args: tuple, kwargs: dict) -> dict:
    """The arguments of a call by name, those for `**kwargs` among them, and those that only a forward takes which a program
    (TRL) has put in the place of the model's."""
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())
    others = {} if takes_all else {k: v for k, v in kwargs.items() if k not in signature.parameters}
    named = dict(signature.bind_partial(*args, **{k: v for k, v in kwargs.items() if k not in others}).arguments) | others
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named |= named.pop(name, {})
    return named


def first_of(named: dict, *names: str) -> Any:
    """The first of these arguments that is given, or None."""
    return next((named[n] for n in names if named.get(n) is not None), None)


def tokens_of(named: dict) -> Any:
    """A call's `input_ids` [B, T] or `inputs_embeds` [B, T, H], or None."""
    return first_of(named, "input_ids", "inputs_embeds")


def is_plain(mask: Any) -> TypeGuard[Tensor]:
    """Whether an attention mask is of rows and places [B, T]; static caches bring 4D ones, or a dict of them by layer."""
    return isinstance(mask, Tensor) and mask.dim() == 2


def shape_of(mask: Any) -> str:
    return str(tuple(mask.shape)) if isinstance(mask, Tensor) else type(mask).__name__


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of a call or an output, whatever holds them, that have a first axis."""
    if isinstance(value, Tensor):
        if value.dim():
            yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))


def rows_of(value: Any) -> int:
    """Rows of a call of which nothing is known: the first axis of its first tensor."""
    return next((t.shape[0] for t in tensors_in(value)), 1)


def chosen_rows(value: Any, rows: list[int], count: int) -> Any:
    """A call with some of its `count` rows: of every tensor whose first axis is as long."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() and value.shape[0] == count else value
    if type(value) in (list, tuple):
        return type(value)(chosen_rows(part, rows, count) for part in value)
    if isinstance(value, Mapping):
        return type(value)({k: chosen_rows(part, rows, count) for k, part in value.items()})  # type: ignore[call-arg]
    return value


def batch_size(named: dict) -> int:
    """Rows of a call, from whichever input it has."""
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "labels"):
        if named.get(name) is not None:
            return named[name].shape[0]
    encoded = named.get("encoder_outputs")
    if encoded is not None:
        return encoded[0].shape[0]
    features = (v for v in named.values() if isinstance(v, Tensor) and v.dim() > 1)  # of sound or images
    return next((v.shape[0] for v in features), 1)


def carries_state(named: dict) -> bool:
    """Whether a call goes on from a recurrent state, in which all that stands before its tokens is (Mamba's `cache_params`,
    RWKV's `state`). Such a state has no places: neither masks nor positions count what it holds."""
    cache = named.get("cache_params")
    if isinstance(cache, Cache):
        filled = (getattr(layer, "has_previous_state", {}) for layer in cache.layers)
        return any(any(states.values()) for states in filled)
    return bool(getattr(cache, "seqlen_offset", 0)) or named.get("state") is not None
