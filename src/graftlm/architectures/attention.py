"""What a model's attention keeps, learnt by watching it once.

Key and value shapes are not guessed from the configuration: a one-token forward on the `meta` device (no memory, no
arithmetic) records what every layer hands to its cache. So grouped and multi-query attention, a head_dim of its own,
layers of mixed sizes and layers without keys come out as they are.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

from ..errors import UnsupportedError
from ..modes import evaluating
from .walk import base_modules

CACHE_NAMES = ("past_key_values", "layer_past", "past_key_value")
CROSS_NAMES = ("key_value_states", "encoder_hidden_states")
MASK_NAMES = ("attention_mask", "mask")
NO_ATTENTION = {"linear_attention", "mamba", "mamba2", "conv", "recurrent", "hybrid", "moe", "mlp"}  # in `layer_types`


class _Recorder(DynamicCache):
    """A cache that notes the shapes it is given: layer -> (kv_heads, head_dim)."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[int, tuple[int, int]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if key_states.shape != value_states.shape:
            raise UnsupportedError(
                f"Layer {layer_idx} keeps keys {tuple(key_states.shape)} and values {tuple(value_states.shape)} of "
                "different shapes; a prefix cannot be placed there. Use prompt tuning, LoRA or bottleneck adapters."
            )
        self.shapes[layer_idx] = (key_states.shape[1], key_states.shape[3])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def attention_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Self- and cross-attention modules: the innermost modules whose forward takes a cache."""
    takers = {}
    for name, module in base_modules(root):
        own = vars(module).get("forward")  # accelerate gives a module a forward of its own
        if _takes_cache(type(module).forward) if own is None else _takes_cache.__wrapped__(own):
            takers[name] = module
    for name, module in takers.items():
        if not any(other.startswith(f"{name}." if name else "") and other != name for other in takers):
            yield name, module


@functools.cache
def _takes_cache(forward: Any) -> bool:
    parameters = inspect.signature(forward).parameters
    return any(n in parameters for n in CACHE_NAMES)


def self_attention_call(module: nn.Module, args: tuple, kwargs: dict) -> dict | None:
    """All arguments of an attention call by name; None for cross-attention."""
    bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    named = dict(bound) | bound.get("kwargs", {})
    named.pop("kwargs", None)
    return None if any(named.get(n) is not None for n in CROSS_NAMES) else named


def kv_shapes(base: Any) -> list[tuple[int, int]]:
    """(kv_heads, head_dim) of every decoder layer (of every layer, for encoders).

    Raises:
        UnsupportedError: a layer keeps no keys and values, so that a prefix cannot reach it.
    """
    config = base.config

    def run(model: nn.Module, recorder: _Recorder, device: torch.device) -> None:
        ids = torch.zeros(1, 1, dtype=torch.long, device=device)
        inputs: dict[str, Any] = {"input_ids": ids, "past_key_values": recorder}
        if getattr(config, "is_encoder_decoder", False):
            inputs |= {"decoder_input_ids": ids, "past_key_values": EncoderDecoderCache(recorder, DynamicCache())}
            if getattr(base, "main_input_name", "input_ids") != "input_ids":  # an encoder of sound: its states will do
                inputs["encoder_outputs"] = (torch.zeros(1, 1, config.hidden_size, device=device),)
                del inputs["input_ids"]
        model(**inputs)

    _refuse_hybrid(base)
    shapes = _observe(base, run)
    if getattr(config, "is_encoder_decoder", False):
        text = config
        layers = getattr(config, "decoder_layers", None) or getattr(config, "num_decoder_layers", None) or len(shapes)
    else:
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        layers = text.num_hidden_layers
    shared = getattr(text, "num_kv_shared_layers", 0) or 0
    missing = [i for i in range(layers - shared) if i not in shapes]
    if missing or not shapes:
        raise _unreachable(base, missing)
    return [shapes[i] for i in sorted(shapes)]


def _refuse_hybrid(base: Any) -> None:
    """UnsupportedError where a configuration says which layers are no attention (Qwen3-Next, Jamba, LFM2)."""
    config = base.config.get_text_config(decoder=True) if hasattr(base.config, "get_text_config") else base.config
    for field in ("layer_types", "layers_block_type", "block_types"):
        kinds = getattr(config, field, None)
        if missing := [i for i, kind in enumerate(kinds or ()) if kind in NO_ATTENTION]:
            raise _unreachable(base, missing)


def _unreachable(base: Any, layers: list[int]) -> UnsupportedError:
    return UnsupportedError(
        f"{type(base).__name__}: layers {layers or 'all'} keep no keys and values, so a prefix cannot reach them. "
        "Use prompt tuning, LoRA or bottleneck adapters on this model."
    )


def encoder_kv_shapes(base: nn.Module) -> list[tuple[int, int]]:
    """(kv_heads, head_dim) of every self-attention of the encoder of an encoder-decoder model."""

    def run(model: Any, recorder: _Recorder, device: torch.device) -> None:
        encoder = model.get_encoder()
        handles = []
        for index, (_, module) in enumerate(attention_modules(encoder)):

            def note(module: nn.Module, args: tuple, kwargs: dict, output: Any, index: int = index) -> None:
                named = self_attention_call(module, args, kwargs) or {}
                width = next(iter(named.values())).shape[-1]
                head_dim = getattr(module, "head_dim", None) or getattr(module, "key_value_proj_dim", None)
                keys = next((m for n, m in module.named_children() if n in ("k", "k_proj", "key")), None)
                if head_dim is None or keys is None:
                    raise UnsupportedError(f"{type(module).__name__}: cannot read the shape of its keys [{width}].")
                recorder.shapes[index] = (keys.out_features // head_dim, head_dim)

            handles.append(module.register_forward_hook(note, with_kwargs=True))
        try:
            encoder(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device))
        finally:
            for handle in handles:
                handle.remove()

    shapes = _observe(base, run)
    if not shapes:
        raise UnsupportedError(f"{type(base).__name__}: found no self-attention in its encoder.")
    return [shapes[i] for i in sorted(shapes)]


def _observe(base: Any, run: Any) -> dict[int, tuple[int, int]]:
    """Run one token through a copy of the model without memory; through the model itself where that cannot be had."""
    try:
        with torch.device("meta"):
            model = type(base)(_plain_config(base.config))
        vars(model.config)["pad_token_id"] = None  # else transformers looks for it among the token's values, to warn
        target, device = model.eval(), torch.device("meta")
        recorder = _Recorder()
        with torch.no_grad():
            run(target, recorder, device)
        return recorder.shapes
    except UnsupportedError:
        raise
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, LookupError) as error:
        device = next(base.parameters()).device
        if device.type == "meta":
            raise UnsupportedError(
                f"{type(base).__name__} does not run on the meta device ({error}); load its weights to attach a prefix."
            ) from error
    recorder = _Recorder()
    try:
        with evaluating(base), torch.no_grad():
            run(base, recorder, device)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        raise UnsupportedError(
            f"{type(base).__name__} does not take a cache of keys and values ({error}), so a prefix cannot reach its layers."
        ) from error
    return recorder.shapes


def _plain_config(config: Any) -> Any:
    """A copy of a configuration without quantisation (the modules' shapes are the same)."""
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    return plain
