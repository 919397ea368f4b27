"""Encoder-decoder models: virtual tokens in the encoder's input (some methods' in the decoder's as well), the prefix in the
decoder's self-attention (and, where it is asked for, in the encoder's).

The virtual tokens are put in before the encoder itself runs (within the model or by itself: `generate` calls it before the
model), and its outputs go back to the given order, virtual tokens first: that is how the decoder sees them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import StaticCache

from ..architectures import backbone_embeddings, position_tables
from ..errors import UnsupportedError
from ..placing import (
    Front,
    chained,
    place_virtual,
    positions_from_mask,
    real_first,
    reorder,
    restore_attention,
    restore_order,
    virtual_order,
    without_holes,
)
from ..routing import Plan
from .facts import Facts
from .inputs import first_of, is_plain, shape_of, tokens_of
from .padded import drops_virtual, with_virtual
from .prefix import pour, prefix_cache
from .refusals import check_encoded, raise_beyond
from .row import IGNORED
from .state import Call, Memory, Placed, Run

if TYPE_CHECKING:
    from ..adapters import AdapterSet


# -- the model -----------------------------------------------------------------------------------------------------------
def lay(host: AdapterSet, plan: Plan, call: Call, run: Run, named: dict) -> tuple[dict, Placed]:
    """Inputs of the model: the prefix in the decoder, and the mask of what the encoder gives."""
    count, prefix = host.fronts(plan, call.batch)
    encoded, mask, given = named.get("encoder_outputs"), named.get("attention_mask"), tokens_of(named)
    memory, masked, positions = None, 0, None
    if encoded is not None and count and not (run.encoded and mask is None):
        check_encoded(encoded, mask, count)
    if mask is None and encoded is None and given is not None:
        mask = given.new_ones(given.shape[:2], dtype=torch.long)
    if count and is_plain(mask):
        named["attention_mask"] = torch.cat((count.ones(mask), mask), dim=1)
        masked = count.most
    order, drop, own = None, 0, host.decoder_front(plan, call.batch)
    width = mask.shape[1] if is_plain(mask := named.get("decoder_attention_mask")) else 0
    if prefix or own:
        cache = named.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        if (own or not prefix.even) and named.get("labels") is not None:
            decoder_inputs(host.base, named)
        if prefix and not past:
            memory = host.memory_rows(plan, call.batch)
            named["past_key_values"] = filled_cache(memory, cache, call)
        mask_front(host.base, named, prefix, own, max(past - prefix.most - own.most, 0))
        if own and not past:
            order = put_in_decoder(host, plan, own, named)
            drop = own.most if drops_virtual(host, named) else 0
    if is_plain(mask := named.get("decoder_attention_mask")):
        given = mask.shape[1] - width  # what follows was given
        whole = torch.cat((mask[:, :given], without_holes(mask[:, given:])), dim=1) if width else mask
        positions = positions_from_mask(whole)
    return named, Placed(order=order, drop=drop, memory=memory, masked=masked, positions=positions)


def put_in_decoder(host: AdapterSet, plan: Plan, own: Front, named: dict) -> Tensor | None:
    """The decoder's virtual tokens, in front of its inputs and labels; returns the order of its places [B, P + T]. Nothing
    without inputs, of which the base speaks itself."""
    embeds = named.get("decoder_inputs_embeds")
    if embeds is None and named.get("decoder_input_ids") is not None:
        embeds = host.base.get_decoder().get_input_embeddings()(named.pop("decoder_input_ids"))
    if embeds is None:
        return None
    rows = host.decoder_rows(plan, len(embeds)).to(embeds.dtype)
    named["decoder_inputs_embeds"] = torch.cat((rows, embeds), dim=1)
    if (labels := named.get("labels")) is not None and labels.shape == embeds.shape[:2]:
        named["labels"] = F.pad(labels, (own.most, 0), value=IGNORED)
    return torch.arange(own.most + embeds.shape[1], device=embeds.device).expand(len(embeds), -1)


def mask_front(base: Any, named: dict, prefix: Front, own: Front, past: int) -> None:
    """Room for the prefix and the decoder's own virtual tokens in its mask. past: tokens in its cache."""
    if prefix and not own.even and not position_tables(base.get_decoder()):
        raise UnsupportedError(
            f"Rows with a prefix, and others with virtual tokens in the decoder, in one batch of {type(base).__name__}: "
            "what fills the places of these would stand between prefix and tokens. Run one adapter a batch."
        )
    if (mask := decoder_mask(named, prefix.even and own.even, past)) is None:
        return
    if not is_plain(mask):
        raise UnsupportedError(f"A prefix needs a decoder_attention_mask [B, T], got {shape_of(mask)}.")
    if not position_tables(base.get_decoder()) and bool((mask[:, 0] == 0).any()):
        raise UnsupportedError(
            f"{type(base).__name__}'s decoder counts positions by place, so padding between its "
            "prefix and the tokens would change the result. Pad the decoder's inputs on the right."
        )
    named["decoder_attention_mask"] = torch.cat((prefix.ones(mask), own.ones(mask), mask), dim=1)


def decoder_mask(named: dict, even: bool, past: int) -> Tensor | None:
    """The decoder's mask as given; all ones where there is none and rows have different numbers of places in front."""
    mask, given = named.get("decoder_attention_mask"), first_of(named, "decoder_input_ids", "decoder_inputs_embeds")
    if mask is not None or even or given is None:
        return mask
    return given.new_ones(given.shape[0], past + given.shape[1], dtype=torch.long)


def decoder_inputs(base: Any, named: dict) -> None:
    """An encoder-decoder model makes its decoder's inputs out of the labels."""
    if first_of(named, "decoder_input_ids", "decoder_inputs_embeds") is None:
        named["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(named["labels"])


def filled_cache(memory: Memory, cache: Any, call: Call) -> EncoderDecoderCache:
    """Self-attention memory with the prefix; cross-attention starts empty."""
    if cache is None and not call.keeps_cache:
        return EncoderDecoderCache(prefix_cache(memory), DynamicCache())
    if cache is not None and isinstance(cache.self_attention_cache, StaticCache):
        raise UnsupportedError("A static cache has no room for the prefix; leave cache_implementation out.")
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if cache is None else cache
    pour(cache.self_attention_cache, memory, call.batch)
    return cache


# -- its encoder ---------------------------------------------------------------------------------------------------------
def lay_encoder(host: AdapterSet, facts: Facts, plan: Plan, named: dict, masked: int) -> tuple[dict, Placed] | None:
    """The encoder's inputs with virtual tokens, and its memory. None where nothing enters: features, images, masks of four
    axes. `masked`: virtual tokens that stand in the mask already."""
    if (given := tokens_of(named)) is None:
        return None
    count, mask = host.fronts(plan, given.shape[0])[0], named.get("attention_mask")
    mask = given.new_ones(given.shape[:2], dtype=torch.long) if mask is None else mask
    if not is_plain(mask):
        if count or host.has_encoder_memory(plan):
            raise UnsupportedError(f"Soft prompts need an attention_mask [B, T] of ones and zeros, got {shape_of(mask)}.")
        return None
    if plan.routes is not None and host.has_encoder_memory(plan):
        raise UnsupportedError(
            "A prefix in the encoder (prefix_in_encoder=True) does not go into a batch of different adapters; run the "
            f"rows of {', '.join(plan.adapters)} by themselves."
        )
    memory, order, mask = host.encoder_memory(plan), None, mask[:, masked:]
    if memory:  # relative positions: the prefix stands right before the real tokens
        order = real_first(mask)
        for name in ("input_ids", "inputs_embeds"):
            if named.get(name) is not None:
                named[name] = reorder(named[name], order)
        mask = reorder(mask, order)
    if count:
        embeds = named.get("inputs_embeds")
        if embeds is None:
            embeds = backbone_embeddings(host.base)(named.pop("input_ids"))
        placed = virtual_order(mask, count)
        named["inputs_embeds"] = place_virtual(host.virtual_rows(plan, embeds.shape[0]), embeds, placed)
        mask = with_virtual(mask, placed, count)
        order = placed if order is None else chained(order, placed, count.most)
    if facts.encoder_room is not None:
        raise_beyond(host, facts, plan, len(mask), facts.encoder_room, mask.shape[1])
    layout = Placed(order=order, memory=memory, positions=positions_from_mask(without_holes(mask)))
    return named | {"attention_mask": mask}, layout


def encoder_in_given_order(output: Any, order: Tensor) -> Any:
    """An encoder's output: virtual tokens first, then the tokens as they were given."""
    named = output if hasattr(output, "keys") else None
    values = [named[k] for k in named] if named is not None else output
    made = [_restored(value, order) for value in values]
    if named is None:
        return tuple(made)
    for key, value in zip(list(named), made, strict=True):
        named[key] = value
    return named


def _restored(value: Any, order: Tensor) -> Any:
    """States [B, P + T, H] or attention weights of the encoder (a tuple of them, one a layer) in the given order."""
    if isinstance(value, tuple):
        return tuple(_restored(v, order) for v in value)
    if not isinstance(value, Tensor):
        return value
    return restore_attention(value, order, order) if value.dim() == 4 else restore_order(value, order)
