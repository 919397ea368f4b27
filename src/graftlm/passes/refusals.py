"""What a pass cannot do, said before it begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import Cache

from ..architectures import finds_features_by_embedding
from ..architectures.fast import attention_window
from ..errors import UnsupportedError
from ..placing import Front, positions_from_mask, without_holes
from ..routing import Plan
from .facts import Facts
from .inputs import first_of, is_plain, shape_of
from .state import Call

if TYPE_CHECKING:
    from ..adapters import AdapterSet


def check_room(host: AdapterSet, facts: Facts, plan: Plan, call: Call, named: dict) -> None:
    """UnsupportedError for more tokens than a learned table has positions for (torch's own error names no lengths)."""
    if facts.room is None:
        return
    half = "decoder_" if facts.encoder_decoder else ""
    given = first_of(named, f"{half}input_ids", f"{half}inputs_embeds")
    mask, cache = named.get(f"{half}attention_mask"), named.get("past_key_values")
    past = cache.get_seq_length() if isinstance(cache, Cache) else 0
    if given is not None and past + given.shape[1] + facts.offset > facts.room:
        positions = named.get("position_ids")
        if positions is None and facts.takes_positions and is_plain(mask):
            positions = positions_from_mask(without_holes(mask))[:, -given.shape[1] :] + facts.offset
        needed = past + given.shape[1] + facts.offset if positions is None else int(positions.max()) + 1
        raise_beyond(host, facts, plan, call.batch, facts.room, needed, padding=positions is None)


def raise_beyond(
    host: AdapterSet, facts: Facts, plan: Plan, batch: int, room: int, needed: int, padding: bool = True
) -> None:  # fmt: skip
    """UnsupportedError if a pass needs more places than the `room` of a table. `padding`: they are counted with padding."""
    if needed > room:
        count, prefix = (front.most for front in host.fronts(plan, batch))
        raise UnsupportedError(
            f"{type(host.base).__name__} has learned positions for {room - facts.offset} places, and this pass needs"
            f" {needed - facts.offset}: tokens{' and padding' if padding else ''}, {count} virtual tokens and "
            f"{prefix} prefix entries. Give fewer tokens (max_length in the tokenizer, max_new_tokens in generate), or "
            "fewer virtual ones."
        )


def check_cache(host: AdapterSet, plan: Plan, cache: Any) -> None:
    """A filled cache must hold what stands in front of this pass's rows (virtual tokens, prefixes) and nothing else."""
    if not isinstance(cache, Cache):
        return
    wanted = host.in_front(plan)
    if cache.get_seq_length() == 0:
        cache.in_front = wanted  # type: ignore[attr-defined]
    elif (held := getattr(cache, "in_front", [()])) != wanted and (any(held) or any(wanted)):
        have, need = (", ".join("+".join(group) or "none" for group in front) for front in (held, wanted))
        raise UnsupportedError(
            f"past_key_values was filled behind the virtual tokens or prefix of: {have}; this pass has those of: {need} "
            "(row by row where rows differ). Go on under the adapters that it was filled under, or with an empty cache."
        )


def held(cache: Cache, count: Front, prefix: Front) -> int:
    """How many places of given tokens a filled cache holds, without what stands in front of them."""
    found = cache.get_seq_length() - count.most - prefix.most
    if found < 0:
        raise UnsupportedError(
            f"past_key_values holds {cache.get_seq_length()} places, fewer than the {count.most + prefix.most} virtual "
            "tokens or prefix entries: it was cut inside of them. Start with an empty cache."
        )
    return found


def refuse_window(base: Any, mask: Tensor, count: Front, prefix: Front) -> None:
    """A sliding window counts places: filling in front of a row's tokens, and padding behind its prefix, take room."""
    window, length = attention_window(base), mask.shape[1] + count.most + prefix.most
    if not window or length <= window:
        return
    if not (count.even and prefix.even):
        raise UnsupportedError(
            f"Rows with virtual tokens or prefixes of different lengths, {length} places long, in one batch of a model "
            f"that attends to {window} places: rows would not equal themselves alone. Run one adapter a batch here."
        )
    if prefix and bool((mask[:, 0] == 0).any()):
        raise UnsupportedError(
            f"Rows with padding on the left, {length} places long with their prefix, on a model that attends to "
            f"{window} places: padding stands between prefix and tokens, so rows would not equal themselves alone. Pad "
            "on the right in a pass; generate rows of one length together."
        )


def refuse_features(base: Any, facts: Facts, named: dict, count: Front) -> None:
    """Images and sound that would get lost, or other positions, behind virtual tokens or a prefix."""
    kinds = ("pixel_values", "input_features", "input_values", "image", "audio", "video")
    given = [k for k, v in named.items() if isinstance(v, Tensor) and v.is_floating_point()]
    features = [k for k in given if k.startswith(kinds)]
    if not features:
        return
    name, use = type(base).__name__, "Use LoRA or bottleneck adapters, or text alone."
    if facts.image_positions:
        raise UnsupportedError(
            f"{name} gives image tokens positions of several axes; soft prompts and prefixes do not go with images here "
            f"({', '.join(features)}). {use}"
        )
    if count and not finds_features_by_embedding(base):
        raise UnsupportedError(
            f"{name} places {', '.join(features)} by token ids, and virtual tokens enter as embeddings. {use}"
        )


def refuse_packed(named: dict) -> None:
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


def keep_apart(base: Any, facts: Facts, named: dict) -> None:
    """Rows that hold several sequences, outside a packed training pass: transformers keeps them apart by their
    positions, where it takes these and keeps no cache. UnsupportedError for a model that does not."""
    positions = named.get("position_ids")
    if positions is None or positions.dim() != 2 or not bool((positions[:, 1:] <= positions[:, :-1]).any()):
        return
    if not facts.takes_positions:
        raise UnsupportedError(
            f"position_ids start again inside a row, and {type(base).__name__} does not read them: only "
            "packed training passes keep its sequences apart. Give every sequence a row of its own."
        )
    if named.get("use_cache") is None and facts.takes("use_cache"):
        named["use_cache"] = False


def check_encoded(encoded: Any, mask: Any, count: Front) -> None:
    """`encoder_outputs` must have come through the adapter: UnsupportedError for those without its virtual tokens."""
    states = encoded[0] if not hasattr(encoded, "last_hidden_state") else encoded.last_hidden_state
    if not is_plain(mask) or states.shape[1] != mask.shape[1] + count.most:
        raise UnsupportedError(
            f"encoder_outputs {tuple(states.shape)} with an attention_mask of {shape_of(mask)}: expected {count.most} "
            "places more than the mask's, for the virtual tokens. Leave encoder_outputs out, or take a pass's "
            "encoder_last_hidden_state under this adapter, with that pass's attention_mask."
        )
