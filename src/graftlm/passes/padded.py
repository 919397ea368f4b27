"""Padded rows of decoder-only and encoder-only models: virtual tokens beside the real ones, a prefix in the cache.

Shapes: B rows, T tokens a row as given, P virtual tokens, K prefix entries, H hidden size::

    ids [B, T]  ->  embeddings [B, P + T, H], mask [B, K + P + T], positions K.., cache of K entries

Decoding steps come with a filled cache: then only mask and positions are extended.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import StaticCache

from ..architectures import backbone_embeddings, blank_ids, per_layer_inputs
from ..errors import UnsupportedError
from ..methods import TaskType
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
from .facts import Facts, decoder_config
from .inputs import carries_state, is_plain, shape_of, tokens_of
from .prefix import pour, prefix_cache
from .refusals import held, keep_apart, refuse_features, refuse_packed, refuse_window
from .state import Call, Memory, Placed

if TYPE_CHECKING:
    from ..adapters import AdapterSet

TOKEN_OUTPUTS = ("logits", "last_hidden_state", "start_logits", "end_logits")


def lay(host: AdapterSet, facts: Facts, plan: Plan, call: Call, named: dict) -> tuple[dict, Placed]:
    """Inputs of the base for this call, and how its tokens were laid out."""
    rows = Rows(host, facts, plan, call, named)
    if rows.given is not None and not carries_state(named):
        rows.refuse()
        if rows.masked():
            rows.padding_last()
            rows.tokens()
            rows.prefixes()
            rows.positions()
    return rows.named, rows.placed


class Rows:
    """A batch on its way in. Its steps change `named`, the arguments of the base, one after the other.

    Attributes:
        given: ids [B, T] or embeddings [B, T, H].
        count, prefix: what stands in front of each row.
        past: places that a filled cache holds.
        mask: of all places so far [B, past + T, growing in front].
        place: positions of the given tokens, growing with them; None for the model's own.
    """

    def __init__(self, host: AdapterSet, facts: Facts, plan: Plan, call: Call, named: dict) -> None:
        self.host, self.facts, self.plan, self.call, self.named = host, facts, plan, call, named
        self.count, self.prefix = host.fronts(plan, call.batch)
        self.given: Any = tokens_of(named)
        self.mask: Any = named.get("attention_mask")
        self.cache: Any = named.get("past_key_values")
        self.past = self.cache.get_seq_length() if isinstance(self.cache, Cache) else 0
        self.place: Any = None
        self.order: Tensor | None = None
        self.keys: Tensor | None = None
        self.memory: Memory | None = None
        self.drop = 0

    @property
    def fronted(self) -> bool:
        """Whether anything stands in front of the rows."""
        return bool(self.count or self.prefix)

    @property
    def uneven(self) -> bool:
        return not (self.count.even and self.prefix.even)

    @property
    def places(self) -> bool:
        """Whether the base is told the positions of its tokens."""
        own = self.facts.image_positions or self.facts.sums_up_mask
        return self.facts.takes_positions and (self.fronted or not own)

    @property
    def placed(self) -> Placed:
        return Placed(order=self.order, keys=self.keys, drop=self.drop, memory=self.memory)

    # -- refuse ------------------------------------------------------------------------------------------------------
    def refuse(self) -> None:
        """UnsupportedError for caches and masks that leave no room in front of the rows."""
        if not self.fronted:
            return
        if isinstance(self.cache, StaticCache):
            raise UnsupportedError("Soft prompts do not work with a static cache; leave cache_implementation out.")
        if self.mask is not None and not is_plain(self.mask):
            raise UnsupportedError(
                f"Soft prompts need an attention_mask [B, T] of ones and zeros, got {shape_of(self.mask)}."
            )
        if self.mask is not None and not self.past and self.mask.shape != self.given.shape[:2]:
            raise UnsupportedError(
                f"attention_mask {tuple(self.mask.shape)} does not fit the inputs {tuple(self.given.shape[:2])}: expected "
                "one place a given token, without the virtual ones."
            )

    # -- mask --------------------------------------------------------------------------------------------------------
    def masked(self) -> bool:
        """Whether there is a mask [B, T] by which the rows are to be laid out; it is made where one is needed."""
        if self.mask is not None and not is_plain(self.mask):
            return False
        if self.mask is None and not self.past:
            keep_apart(self.host.base, self.facts, self.named)
        if self.fronted:
            refuse_packed(self.named)
            refuse_features(self.host.base, self.facts, self.named, self.count)
            self.whole_mask()
        if self.mask is not None:
            return True
        if self.past and self.named.get("position_ids") is not None:
            self.named["position_ids"] = self.named["position_ids"] + self.count.each + self.prefix.each
        return False

    def whole_mask(self) -> None:
        """The mask of all given tokens, those in the cache included."""
        before = held(self.cache, self.count, self.prefix) if self.past else 0
        length = self.given.shape[1]
        if self.mask is not None and self.past and self.mask.shape[1] != before + length:
            raise UnsupportedError(
                f"attention_mask {tuple(self.mask.shape)}: expected one place for each of the {before} tokens in "
                f"past_key_values and the {length} given ones, without virtual tokens or a prefix."
            )
        if self.mask is None and (not self.past or self.uneven):
            self.mask = self.given.new_ones(self.given.shape[0], before + length, dtype=torch.long)
        if self.mask is not None:
            refuse_window(self.host.base, self.mask, self.count, self.prefix)

    # -- tokens ------------------------------------------------------------------------------------------------------
    def padding_last(self) -> None:
        """Each row's real tokens first, for heads that read the first place (left padding would be read)."""
        if not self.facts.to_right or self.mask.shape != self.given.shape[:2]:
            return
        self.order = real_first(self.mask)
        for name in ("input_ids", "inputs_embeds", "token_type_ids", "position_ids"):
            if (value := self.named.get(name)) is not None:
                self.named[name] = reorder(value.expand(self.mask.shape[0], *value.shape[1:]), self.order)
        self.mask = reorder(self.mask, self.order)

    def tokens(self) -> None:
        """The virtual tokens, beside the real ones; behind a filled cache only their places."""
        self.place = self.named.get("position_ids")
        if self.place is None and self.places and not self.facts.counts_from_ids:
            mask = self.mask if self.facts.sums_up_mask else without_holes(self.mask)
            self.place = positions_from_mask(mask)[:, -self.given.shape[1] :] + self.facts.offset
        if self.count and self.past:
            self.keys = virtual_order(self.mask, self.count)
            self.mask = with_virtual(self.mask, self.keys, self.count)
            self.place = None if self.place is None else self.place + self.count.each
        elif self.count:
            self.place_tokens()

    def place_tokens(self) -> None:
        """Put the virtual tokens beside the real ones in everything that runs along the token axis."""
        named, front, mask = self.named, self.count, self.mask
        ids = self.facts.signature.parameters.get("input_ids")
        if not self.facts.takes("inputs_embeds") or (ids is not None and ids.default is inspect.Parameter.empty):
            raise UnsupportedError(
                f"{type(self.host.base).__name__} takes token ids only, and virtual tokens enter as embeddings. Use LoRA, "
                "prefix tuning or bottleneck adapters."
            )
        ids, embeds = named.pop("input_ids", None), named.get("inputs_embeds")
        if embeds is None:
            embeds = backbone_embeddings(self.host.base)(ids)
        batch, count = embeds.shape[0], front.most
        order = virtual_order(mask, front, self.facts.to_left)
        if self.facts.to_right and not front.even:
            order = reorder(order, real_first(with_virtual(mask, order, front)))
        if self.facts.per_layer is not None:
            self.layers_inputs(ids, order)
        named["inputs_embeds"] = place_virtual(self.host.virtual_rows(self.plan, batch), embeds, order)
        self.mask = with_virtual(mask, order, front)
        self.place_beside((batch, embeds.shape[1]), mask, order)
        if self.place is not None:
            positions = self.place.expand(batch, -1)
            first = torch.where(mask.bool(), positions, positions.max() + 1).amin(1, keepdim=True)
            virtual_positions = first + torch.arange(count, device=positions.device) - (count - front.each)
            self.place = place_virtual(virtual_positions.clamp_min_(0), positions + front.each, order)
            named["position_ids"] = self.place
        self.order = order if self.order is None else chained(self.order, order, count)
        self.drop = count if drops_virtual(self.host, named) else 0

    def layers_inputs(self, ids: Tensor | None, order: Tensor) -> None:
        """Embeddings by layer, which cannot be looked up where embeddings are given; ids [B, T], order [B, P + T]."""
        table, given = self.facts.per_layer, self.named.get("per_layer_inputs")
        blank = blank_ids(table, len(order), self.count.most)
        if ids is not None:
            self.named |= per_layer_inputs(table, place_virtual(blank, ids, order))
        elif given is not None:
            virtual = per_layer_inputs(table, blank)["per_layer_inputs"]
            self.named["per_layer_inputs"] = place_virtual(virtual, given, order)
        else:
            raise UnsupportedError(
                f"{type(self.host.base).__name__} looks up embeddings by layer from token ids, which inputs_embeds do not "
                "tell. Pass input_ids, or per_layer_inputs beside inputs_embeds."
            )

    def place_beside(self, shape: tuple[int, int], mask: Tensor, order: Tensor) -> None:
        """What belongs to the given tokens [B, T] is placed as they are, and what names places moves on."""
        named, front = self.named, self.count
        for name, filler in (("token_type_ids", 0), ("labels", -100), ("shift_labels", -100)):
            value = named.get(name)
            if value is None or value.shape != shape or not self.per_token(name):
                continue
            if name == "labels" and not front.even and self.shifts_labels:  # no filling predicts a row's first token
                opens = mask.bool() & mask.cumsum(-1).eq(1) & (front.each == 0)
                value = value.masked_fill(opens, filler)
            named[name] = place_virtual(value.new_full((shape[0], front.most), filler), value, order)
        for name in ("start_positions", "end_positions"):
            if named.get(name) is not None:
                named[name] = named[name] + front.most
        if isinstance(named.get("logits_to_keep"), Tensor):
            named["logits_to_keep"] = named["logits_to_keep"] + front.most

    @property
    def shifts_labels(self) -> bool:
        """Whether the base predicts each label from the place before it."""
        return getattr(getattr(self.host.base, "loss_function", None), "__name__", "") == "ForCausalLMLoss"

    def per_token(self, name: str) -> bool:
        """Whether an input runs along the token axis (the labels of a sequence classifier do not)."""
        return name == "token_type_ids" or self.host.task_type is not TaskType.SEQ_CLS

    # -- prefix ------------------------------------------------------------------------------------------------------
    def prefixes(self) -> None:
        """The prefix: room in mask and positions, and its keys and values where no cache holds them."""
        prefix = self.prefix
        if not prefix:
            return
        if not self.facts.counts_from_mask and (not prefix.even or bool((self.mask[:, 0] == 0).any())):
            raise UnsupportedError(
                f"{type(self.host.base).__name__} counts positions by place, so padding between a prefix and the tokens "
                "would change the result. Pad on the right, or give rows of one length."
            )
        self.mask = torch.cat((prefix.ones(self.mask), self.mask), dim=1)
        self.place = None if self.place is None else self.place + prefix.each
        if self.past == 0:
            self.named["past_key_values"] = self.filled_cache()

    def filled_cache(self) -> Cache:
        """The cache that holds the prefix, for a pass that starts with none."""
        self.memory = self.host.memory_rows(self.plan, self.call.batch)
        if self.cache is None and not self.call.keeps_cache:
            return prefix_cache(self.memory)
        if isinstance(self.cache, StaticCache):
            raise UnsupportedError(
                "A static cache has no room for the prefix; leave cache_implementation out, or use 'dynamic'."
            )
        cache = DynamicCache(config=decoder_config(self.host.base)) if self.cache is None else self.cache
        return pour(cache, self.memory, self.call.batch)

    # -- positions ---------------------------------------------------------------------------------------------------
    def positions(self) -> None:
        """Mask and positions of all that is in the rows now."""
        named, facts = self.named, self.facts
        named["attention_mask"] = self.mask
        if not self.places:
            return
        embeds = named.get("inputs_embeds")
        length = self.given.shape[1] if embeds is None else embeds.shape[1]
        if self.place is None and (self.uneven or embeds is not None):
            self.place = positions_from_mask(self.mask)[:, -length:] + facts.offset
        if self.place is not None:
            named["position_ids"] = self.place


def with_virtual(mask: Tensor, order: Tensor, front: Front) -> Tensor:
    """A mask [B, T] with the virtual tokens' ones in their places [B, P + T]."""
    return place_virtual(front.ones(mask), mask, order)


def drops_virtual(host: AdapterSet, named: dict) -> bool:
    """Whether outputs are one a given token, without the virtual ones: for token-level tasks, and for a Trainer, which
    hands them on beside its labels (to a loss of its own, to `compute_metrics`)."""
    trains = named.get("num_items_in_batch") is not None
    return trains or host.task_type in (TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)


def in_given_order(output: Any, placed: Placed, pools: bool) -> None:
    """Put back what runs along the token axis: states and queries of this pass, and the keys that it looked at. `pools`: the
    logits are one a row."""
    order, drop = placed.order, placed.drop
    keys: Any = order if placed.keys is None else placed.keys
    if getattr(output, "attentions", None):
        made = tuple(a if a is None else restore_attention(a, order, keys) for a in output.attentions)
        output.attentions = tuple(a if a is None else a[:, :, drop:] for a in made)
    if order is None:
        return
    for name in TOKEN_OUTPUTS:
        value = output.get(name)
        pooled = name == "logits" and pools
        if value is not None and not pooled and value.dim() >= 2 and value.shape[:2] == order.shape:
            output[name] = restore_order(value, order)[:, drop:]
    if getattr(output, "hidden_states", None):
        states = [restore_order(h, order) if h.shape[:2] == order.shape else h for h in output.hidden_states]
        output.hidden_states = tuple(h[:, drop:] for h in states)
