"""Where adapters enter a forward pass of the base model: virtual tokens, attention memory, positions.

Shapes: B rows, T tokens a row as given, P virtual tokens, K prefix entries, H hidden size.

The wrapper hooks the base model itself, so one mechanism serves `forward`, `generate` with any decoding strategy, and
every task head. Inputs are changed on the way in, and the outputs' token axis is put back on the way out::

    decoder / encoder   ids [B, T]  ->  embeddings [B, P + T, H], mask [B, K + P + T], positions K.., cache of K entries
    encoder-decoder     virtual tokens go to the encoder's input, the prefix to the decoder's self-attention

Decoding steps come with a filled cache: then only mask and positions are extended.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer, StaticCache

from .architectures import (
    attention_modules,
    backbone_embeddings,
    counts_from_ids,
    counts_from_mask,
    finds_features_by_embedding,
    has_image_positions,
    is_encoder_decoder,
    pools_first_token,
    pools_last_token,
    position_offset,
    self_attention_call,
    takes_position_ids,
)
from .architectures.attention import CACHE_NAMES, MASK_NAMES
from .architectures.fast import attention_window
from .engine import Engine
from .engine.output import Hook
from .errors import UnsupportedError
from .methods import TaskType
from .routing import (
    Front,
    Plan,
    current_plan,
    place_virtual,
    positions_from_mask,
    real_first,
    reorder,
    restore_order,
    virtual_order,
)

if TYPE_CHECKING:
    from .model import PeftModel

Memory = list[tuple[Tensor, Tensor]]
TOKEN_OUTPUTS = ("logits", "last_hidden_state", "start_logits", "end_logits")


class PrefixLayer(DynamicLayer):
    """One layer's prefix [kv_heads, K, head_dim]: `update` puts it in front and keeps nothing, so that a layer can be
    run twice (activation checkpointing) with the same result."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.prefix = (keys, values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = (t.to(key_states.dtype).expand(key_states.shape[0], -1, -1, -1) for t in self.prefix)
        return torch.cat((keys, key_states), dim=-2), torch.cat((values, value_states), dim=-2)

    def get_seq_length(self) -> int:
        return self.prefix[0].shape[-2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


def prefix_cache(memory: Memory) -> Cache:
    """A cache of prefixes that is never filled further."""
    return Cache(layers=[PrefixLayer(k, v) for k, v in memory])


class Entry:
    """The hooks of one wrapper on its base model."""

    def __init__(self, host: PeftModel) -> None:
        base = host.base
        self.host = host
        self.signature = inspect.signature(base.forward)
        self.encoder_decoder = is_encoder_decoder(base)
        self.takes_positions = takes_position_ids(base)
        self.counts_from_mask = counts_from_mask(base)
        self.image_positions = has_image_positions(base)  # of several axes, which cannot be shifted behind virtual tokens
        self.offset = position_offset(base)
        self.counts_from_ids = counts_from_ids(base)
        self.to_left = pools_last_token(base)
        self.to_right = pools_first_token(base)
        encoder = base.get_encoder() if self.encoder_decoder else None
        self.encoder_attention = {id(m): i for i, (_, m) in enumerate(attention_modules(encoder))} if encoder else {}
        self.engine = Engine(host, self)

    def connect(self) -> list[Any]:
        """Register the hooks; returns their handles."""
        base = self.host.base
        handles = [
            base.register_forward_pre_hook(Hook(self, "before"), with_kwargs=True),
            base.register_forward_hook(Hook(self, "after"), with_kwargs=True),
            *self.engine.connect(),
        ]
        if self.host.has_memory:
            handles += [
                module.register_forward_pre_hook(Hook(self, "restore_memory"), with_kwargs=True)
                for _, module in attention_modules(base)
                if id(module) not in self.encoder_attention
            ]
        if self.encoder_decoder:
            encoder = base.get_encoder()
            handles.append(encoder.register_forward_pre_hook(Hook(self, "before_encoder"), with_kwargs=True))
            if self.host.has_memory:
                handles += [
                    module.register_forward_pre_hook(Hook(self, "add_encoder_memory"), with_kwargs=True)
                    for _, module in attention_modules(encoder)
                ]
            halves = ((encoder, "place_positions"), (base.get_decoder(), "place_decoder_positions"))
            for half, hook in halves if not self.takes_positions else ():
                for module in half.modules():
                    if isinstance(module, nn.Embedding) and hasattr(module, "offset"):
                        handles.append(module.register_forward_hook(Hook(self, hook)))
        return handles

    def plan(self) -> Plan | None:
        """The running plan if it is this wrapper's."""
        plan = current_plan()
        return plan if plan is not None and plan.switch is self.host.switch else None

    # -- the base model ----------------------------------------------------------------------------------------------
    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Forward pre-hook of the base model."""
        plan = self.plan()
        if plan is None:
            return None
        named = self.named(args, kwargs)
        self.host.protect_checkpointing()
        plan.scratch.clear()
        plan.scratch |= {"in_base": True, "batch": batch_size(named), "use_cache": self.keeps_cache(named)}
        return (), self.engine.enter(plan, named, self.enter_encoder_decoder if self.encoder_decoder else self.enter)

    def named(self, args: tuple, kwargs: dict) -> dict:
        """The arguments of a call of the base model by name."""
        named = dict(self.signature.bind_partial(*args, **kwargs).arguments)
        for name, parameter in self.signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                named |= named.pop(name, {})
        return named

    def keeps_cache(self, named: dict) -> bool:
        """Whether this call's cache is for later steps; without, a prefix is put in front and nothing is kept."""
        asked = named.get("use_cache")
        if asked is None:
            asked = getattr(self.decoder_config(), "use_cache", False)
        return bool(asked) and not self.host.base.training

    def enter(self, plan: Plan, named: dict) -> dict:
        """Inputs of a decoder-only or encoder-only model."""
        count, prefix = self.host.fronts(plan, plan.scratch["batch"])
        given = named.get("input_ids") if named.get("input_ids") is not None else named.get("inputs_embeds")
        if given is None:
            return named
        mask, cache = named.get("attention_mask"), named.get("past_key_values")
        past = cache.get_seq_length() if isinstance(cache, Cache) else 0
        if (count or prefix) and isinstance(cache, StaticCache):
            raise UnsupportedError("Soft prompts do not work with a static cache; leave cache_implementation out.")
        if (count or prefix) and mask is not None and not past and mask.shape[:2] != given.shape[:2] and mask.dim() == 2:
            raise UnsupportedError(
                f"attention_mask {tuple(mask.shape)} does not fit the inputs {tuple(given.shape[:2])}: expected one place a "
                "given token, without the virtual ones."
            )
        if mask is not None and mask.dim() != 2:
            if count or prefix:
                raise UnsupportedError(
                    f"Soft prompts need an attention_mask [B, T] of ones and zeros, got {tuple(mask.shape)}."
                )
            return named
        if mask is None and not past:
            self.keep_apart(named)
        uneven = not (count.even and prefix.even)
        if count or prefix:
            self.refuse_packed(named)
            self.refuse_features(named, count)
            if mask is None and (not past or uneven):
                before = past - count.most - prefix.most if past else 0
                mask = given.new_ones(given.shape[0], before + given.shape[1], dtype=torch.long)
            if uneven and mask is not None:
                self.refuse_window(mask.shape[1] + count.most + prefix.most)
        if mask is None:
            if past and named.get("position_ids") is not None:
                named["position_ids"] = named["position_ids"] + count.each + prefix.each
            return named
        if self.to_right and mask.shape == given.shape[:2]:
            named, mask = self.padding_last(named, mask)
        positions = named.get("position_ids")
        if past == 0 and count:
            named = self.place_tokens(plan, named, mask, count)
            positions = named.get("position_ids")
            mask = named["attention_mask"]
        elif past and count:
            mask = self.with_virtual(mask, virtual_order(mask, count), count)
            positions = None if positions is None else positions + count.each
        if prefix:
            if not self.counts_from_mask and (not prefix.even or bool((mask[:, 0] == 0).any())):
                raise UnsupportedError(
                    f"{type(self.host.base).__name__} counts positions by place, so padding between a prefix and the tokens "
                    "would change the result. Pad on the right, or give rows of one length."
                )
            mask = torch.cat((prefix.ones(mask), mask), dim=1)
            positions = None if positions is None else positions + prefix.each
            if past == 0:
                named["past_key_values"] = self.fill_cache(plan, cache)
        named["attention_mask"] = mask
        if self.takes_positions and (count or prefix or not self.image_positions):
            length = named["inputs_embeds"].shape[1] if named.get("inputs_embeds") is not None else given.shape[1]
            if positions is None and (not self.counts_from_ids or uneven or named.get("inputs_embeds") is not None):
                positions = positions_from_mask(mask)[:, -length:] + self.offset
            if positions is not None:
                named["position_ids"] = positions
        return named

    @staticmethod
    def padding_last(named: dict, mask: Tensor) -> tuple[dict, Tensor]:
        """Inputs with each row's real tokens first, for heads that read the first place (left padding would be read)."""
        order = real_first(mask)
        for name in ("input_ids", "inputs_embeds", "token_type_ids", "position_ids"):
            if (value := named.get(name)) is not None:
                named[name] = reorder(value.expand(mask.shape[0], *value.shape[1:]), order)
        return named, reorder(mask, order)

    def place_tokens(self, plan: Plan, named: dict, mask: Tensor, front: Front) -> dict:
        """Put the virtual tokens beside the real ones in everything that runs along the token axis."""
        embeds = named.get("inputs_embeds")
        ids = self.signature.parameters.get("input_ids")
        if "inputs_embeds" not in self.signature.parameters or (ids is not None and ids.default is inspect.Parameter.empty):
            raise UnsupportedError(
                f"{type(self.host.base).__name__} takes token ids only, and virtual tokens enter as embeddings. Use LoRA, "
                "prefix tuning or bottleneck adapters."
            )
        if embeds is None:
            embeds = backbone_embeddings(self.host.base)(named.pop("input_ids"))
        batch, length = embeds.shape[:2]
        order, count = virtual_order(mask, front, self.to_left), front.most
        if self.to_right and not front.even:
            order = reorder(order, real_first(self.with_virtual(mask, order, front)))
        named["inputs_embeds"] = place_virtual(self.host.virtual_rows(plan, batch), embeds, order)
        named["attention_mask"] = self.with_virtual(mask, order, front)
        for name, filler in (("token_type_ids", 0), ("labels", -100), ("shift_labels", -100)):
            value = named.get(name)
            if value is not None and value.shape[:2] == (batch, length) and value.dim() == 2 and self.per_token(name):
                if name == "labels" and not front.even and self.shifts_labels:  # no filling predicts a row's first token
                    opens = mask.bool() & mask.cumsum(-1).eq(1) & (front.each == 0)
                    value = value.masked_fill(opens, filler)
                named[name] = place_virtual(value.new_full((batch, count), filler), value, order)
        if (positions := named.get("position_ids")) is not None:
            positions = positions.expand(batch, -1)
            first = torch.where(mask.bool(), positions, positions.max() + 1).amin(1, keepdim=True)
            virtual_positions = first + torch.arange(count, device=positions.device) - (count - front.each)
            named["position_ids"] = place_virtual(virtual_positions.clamp_min_(0), positions + front.each, order)
        for name in ("start_positions", "end_positions"):
            if named.get(name) is not None:
                named[name] = named[name] + count
        if isinstance(named.get("logits_to_keep"), Tensor):
            named["logits_to_keep"] = named["logits_to_keep"] + count
        plan.scratch |= {"order": order, "count": count, "drop": self.drops_virtual(named)}
        if named.get("return_dict") is False:
            plan.scratch["tuple"] = named["return_dict"] = True
        return named

    @property
    def shifts_labels(self) -> bool:
        """Whether the base predicts each label from the place before it."""
        return getattr(getattr(self.host.base, "loss_function", None), "__name__", "") == "ForCausalLMLoss"

    def per_token(self, name: str) -> bool:
        """Whether an input runs along the token axis (the labels of a sequence classifier do not)."""
        return name == "token_type_ids" or self.host.task_type is not TaskType.SEQ_CLS

    def drops_virtual(self, named: dict) -> bool:
        """Whether outputs are one a given token, without the virtual ones: for token-level tasks, and for a Trainer, which
        hands them on beside its labels (to a loss of its own, to `compute_metrics`)."""
        trains = named.get("num_items_in_batch") is not None
        return trains or self.host.task_type in (TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)

    @staticmethod
    def with_virtual(mask: Tensor, order: Tensor, front: Front) -> Tensor:
        """A mask [B, T] with the virtual tokens' ones in their places [B, P + T]."""
        return place_virtual(front.ones(mask), mask, order)

    def refuse_window(self, length: int) -> None:
        """Filling in front of a row's tokens takes room in a sliding window, which counts places."""
        window = attention_window(self.host.base)
        if window and length > window:
            raise UnsupportedError(
                f"Rows with virtual tokens or prefixes of different lengths, {length} places long, in one batch of a model "
                f"that attends to {window} places: rows would not equal themselves alone. Run one adapter a batch here."
            )

    def refuse_features(self, named: dict, count: Front) -> None:
        """Images and sound that would get lost, or other positions, behind virtual tokens or a prefix."""
        kinds = ("pixel_values", "input_features", "input_values", "image", "audio", "video")
        given = [k for k, v in named.items() if isinstance(v, Tensor) and v.is_floating_point()]
        features = [k for k in given if k.startswith(kinds)]
        if not features:
            return
        name, use = type(self.host.base).__name__, "Use LoRA or bottleneck adapters, or text alone."
        if self.image_positions:
            raise UnsupportedError(
                f"{name} gives image tokens positions of several axes; soft prompts and prefixes do not go with images here "
                f"({', '.join(features)}). {use}"
            )
        if count and not finds_features_by_embedding(self.host.base):
            raise UnsupportedError(
                f"{name} places {', '.join(features)} by token ids, and virtual tokens enter as embeddings. {use}"
            )

    def keep_apart(self, named: dict) -> None:
        """Rows that hold several sequences, outside a packed training pass: transformers keeps them apart by their
        positions, where it takes these and keeps no cache. UnsupportedError for a model that does not."""
        positions = named.get("position_ids")
        if positions is None or positions.dim() != 2 or not bool((positions[:, 1:] <= positions[:, :-1]).any()):
            return
        if not self.takes_positions:
            raise UnsupportedError(
                f"position_ids start again inside a row, and {type(self.host.base).__name__} does not read them: only "
                "packed training passes keep its sequences apart. Give every sequence a row of its own."
            )
        if named.get("use_cache") is None and "use_cache" in self.signature.parameters:
            named["use_cache"] = False

    def refuse_packed(self, named: dict) -> None:
        """Rows that hold several sequences (positions that start again) would need virtual tokens inside the row."""
        positions, mask = named.get("position_ids"), named.get("attention_mask")
        if positions is None or positions.shape[-1] < 2:
            return
        back = positions[..., 1:] < positions[..., :-1]
        if mask is not None and mask.shape == positions.shape:
            back = back & mask[:, 1:].bool() & mask[:, :-1].bool()
        if bool(back.any()):
            raise UnsupportedError(
                "position_ids start again inside a row: several sequences packed into one. With a soft prompt or prefix "
                "each needs its own virtual tokens; give every sequence a row of its own."
            )

    def fill_cache(self, plan: Plan, cache: Cache | None) -> Cache:
        """The cache that holds the prefix, for a pass that starts with none."""
        memory = self.host.memory_rows(plan, plan.scratch["batch"])
        plan.scratch["memory"] = memory
        if cache is None and not plan.scratch["use_cache"]:
            return prefix_cache(memory)
        if isinstance(cache, StaticCache):
            raise UnsupportedError(
                "A static cache has no room for the prefix; leave cache_implementation out, or use 'dynamic'."
            )
        filled = cache if cache is not None else DynamicCache(config=self.decoder_config())
        return self.pour(filled, memory, plan.scratch["batch"])

    @staticmethod
    def pour(cache: Cache, memory: Memory, batch: int) -> Cache:
        """Write the prefix into a cache, once a row."""
        for index, (keys, values) in enumerate(memory):
            cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), index)
        return cache

    def decoder_config(self) -> Any:
        config = self.host.base.config
        return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Forward hook of the base model: outputs along the token axis go back to the order they were given in.

        As with HF PEFT the virtual tokens' outputs come first ([B, P + T, …]), unless `drops_virtual`.
        """
        plan = self.plan()
        if plan is None:
            return None
        if plan.scratch.get("memory") and not plan.scratch["use_cache"] and hasattr(output, "pop"):
            output.past_key_values = None  # it holds the prefix alone and cannot be gone on from
        if plan.scratch.get("loss") is not None:
            return self.engine.leave_base(plan, output)
        if "order" not in plan.scratch:
            return output
        order, count = plan.scratch["order"], plan.scratch["count"]
        for name in TOKEN_OUTPUTS:
            value = output.get(name) if hasattr(output, "get") else None
            if value is not None and value.dim() >= 2 and value.shape[:2] == order.shape:
                value = restore_order(value, order)
                output[name] = value[:, count:] if plan.scratch["drop"] else value
        if getattr(output, "hidden_states", None):
            states = [restore_order(h, order) if h.shape[:2] == order.shape else h for h in output.hidden_states]
            output.hidden_states = tuple(h[:, count:] if plan.scratch["drop"] else h for h in states)
        return output.to_tuple() if plan.scratch.get("tuple") else output

    # -- encoder-decoder models --------------------------------------------------------------------------------------
    def enter_encoder_decoder(self, plan: Plan, named: dict) -> dict:
        """Inputs of an encoder-decoder model: virtual tokens in the encoder, the prefix in the decoder."""
        count, prefix = self.host.fronts(plan, plan.scratch["batch"])
        encoded = named.get("encoder_outputs")
        given = named.get("input_ids") if named.get("input_ids") is not None else named.get("inputs_embeds")
        mask = named.get("attention_mask")
        if encoded is None and given is not None:
            mask = given.new_ones(given.shape[:2], dtype=torch.long) if mask is None else mask
            named = self.encoder_tokens(plan, named, mask, count)
        elif encoded is not None and mask is not None and count:
            states = encoded[0] if not hasattr(encoded, "last_hidden_state") else encoded.last_hidden_state
            if states.shape[1] == mask.shape[1] + count.most:
                mask = named["attention_mask"] = self.with_virtual(mask, virtual_order(mask, count), count)
        if encoded is not None and mask is not None and self.host.has_encoder_memory(plan):
            named["attention_mask"] = reorder(mask, real_first(mask))
        if prefix:
            cache = named.get("past_key_values")
            if cache is None or cache.get_seq_length() == 0:
                named["past_key_values"] = self.fill_decoder_cache(plan, cache)
            if not prefix.even and named.get("labels") is not None:
                self.engine.decoder_inputs(named)
            if (decoder_mask := self.decoder_mask(named, prefix)) is not None:
                mask = named["decoder_attention_mask"] = torch.cat((prefix.ones(decoder_mask), decoder_mask), dim=1)
                if not prefix.even:
                    plan.scratch["decoder_positions"] = positions_from_mask(mask)
        return named

    @staticmethod
    def decoder_mask(named: dict, prefix: Front) -> Tensor | None:
        """The decoder's mask as given; all ones where there is none and rows have prefixes of different lengths."""
        mask = named.get("decoder_attention_mask")
        given = next((named[k] for k in ("decoder_input_ids", "decoder_inputs_embeds") if named.get(k) is not None), None)
        if mask is not None or prefix.even or given is None:
            return mask
        past = named["past_key_values"].get_seq_length() - prefix.most
        return given.new_ones(given.shape[0], past + given.shape[1], dtype=torch.long)

    def encoder_tokens(self, plan: Plan, named: dict, mask: Tensor, count: Front) -> dict:
        """The encoder's inputs with virtual tokens, and its memory."""
        if plan.routes is not None and self.host.has_encoder_memory(plan):
            raise UnsupportedError(
                "A prefix in the encoder (prefix_in_encoder=True) does not go into a batch of different adapters; run the "
                f"rows of {', '.join(plan.adapters)} by themselves."
            )
        plan.scratch["encoder_memory"] = self.host.encoder_memory(plan)
        if plan.scratch["encoder_memory"]:  # relative positions: the prefix stands right before the real tokens
            named, mask = self.padding_last(named, mask)
            named["attention_mask"] = mask
        if count:
            embeds = named.get("inputs_embeds")
            if embeds is None:
                embeds = backbone_embeddings(self.host.base)(named.pop("input_ids"))
            order = virtual_order(mask, count)
            virtual = self.host.virtual_rows(plan, embeds.shape[0])
            named["inputs_embeds"] = place_virtual(virtual, embeds, order)
            mask = named["attention_mask"] = self.with_virtual(mask, order, count)
        plan.scratch["encoder_positions"] = positions_from_mask(mask)
        return named

    def fill_decoder_cache(self, plan: Plan, cache: Any) -> EncoderDecoderCache:
        """Self-attention memory with the prefix; cross-attention starts empty."""
        memory = self.host.memory_rows(plan, plan.scratch["batch"])
        plan.scratch["memory"] = memory
        if cache is None and not plan.scratch["use_cache"]:
            return EncoderDecoderCache(prefix_cache(memory), DynamicCache())
        if cache is not None and isinstance(cache.self_attention_cache, StaticCache):
            raise UnsupportedError("A static cache has no room for the prefix; leave cache_implementation out.")
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if cache is None else cache
        self.pour(cache.self_attention_cache, memory, plan.scratch["batch"])
        return cache

    def before_encoder(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Forward pre-hook of the encoder: `generate` calls it by itself, before the model."""
        plan = self.plan()
        if plan is None or plan.scratch.get("in_base"):
            return None
        named = dict(inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments)
        named |= named.pop("kwargs", {})
        given: Any = named.get("input_ids") if named.get("input_ids") is not None else named.get("inputs_embeds")
        if given is None:  # an encoder of features or images
            return None
        mask = named.get("attention_mask")
        mask = given.new_ones(given.shape[:2], dtype=torch.long) if mask is None else mask
        return (), self.encoder_tokens(plan, named, mask, self.host.fronts(plan, given.shape[0])[0])

    def place_positions(self, module: Any, args: tuple, output: Tensor) -> Tensor:
        """Forward hook of an encoder's learned positions (BART counts padding): take them from the mask."""
        return self.positions_by_mask(module, "encoder_positions", output)

    def place_decoder_positions(self, module: Any, args: tuple, output: Tensor) -> Tensor:
        """The same for the decoder, where rows have prefixes of different lengths."""
        return self.positions_by_mask(module, "decoder_positions", output)

    def positions_by_mask(self, module: Any, name: str, output: Tensor) -> Tensor:
        plan = self.plan()
        positions = plan.scratch.get(name) if plan else None
        if positions is None:
            return output
        return F.embedding(positions[:, -output.shape[-2] :] + module.offset, module.weight)

    # -- attention modules -------------------------------------------------------------------------------------------
    def restore_memory(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Pre-hook of attention: give the prefix back where activation checkpointing has taken the cache away."""
        plan = self.plan()
        if plan is None or not plan.scratch.get("memory") or getattr(module, "layer_idx", None) is None:
            return None
        named = self_attention_call(module, args, kwargs)
        if named is None or any(named.get(n) is not None for n in CACHE_NAMES):
            return None
        parameters = inspect.signature(module.forward).parameters
        name = next(n for n in CACHE_NAMES if n in parameters)
        named[name] = prefix_cache(plan.scratch["memory"])
        return (), named

    def add_encoder_memory(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Pre-hook of the encoder's self-attention: its prefix, and the mask's room for it."""
        plan = self.plan()
        memory = plan.scratch.get("encoder_memory") if plan else None
        named = self_attention_call(module, args, kwargs) if memory else None
        if named is None or memory is None:
            return None
        index = self.encoder_attention[id(module)]
        layers = [PrefixLayer(*memory[index])] * (1 + (getattr(module, "layer_idx", None) or 0))
        parameters = inspect.signature(module.forward).parameters
        named[next(n for n in CACHE_NAMES if n in parameters)] = Cache(layers=layers)
        for name in MASK_NAMES:
            if (mask := named.get(name)) is not None:
                fill = True if mask.dtype == torch.bool else (1 if mask.dim() == 2 else 0)
                named[name] = F.pad(mask, (memory[index][0].shape[-2], 0), value=fill)
        return (), named


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
