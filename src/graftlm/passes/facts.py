"""What passes need to know of a base, read once."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from ..architectures import (
    counts_from_ids,
    counts_from_mask,
    has_image_positions,
    is_encoder_decoder,
    per_layer_table,
    pools_first_token,
    pools_last_token,
    position_offset,
    position_room,
    sums_up_mask,
    takes_position_ids,
)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """How a base takes its inputs and counts positions.

    Args:
        signature: of its forward.
        image_positions: positions have several axes, which cannot be shifted behind virtual tokens.
        offset: position of a row's first token.
        room, encoder_room: positions that there are vectors for; None where they are computed.
        to_left, to_right: the side of a row that its head reads, to which the real tokens are moved.
        per_layer: the module that looks up embeddings by layer, which given embeddings leave out; None for most.
    """

    signature: inspect.Signature
    encoder_decoder: bool
    takes_positions: bool
    counts_from_mask: bool
    counts_from_ids: bool
    sums_up_mask: bool
    image_positions: bool
    offset: int
    room: int | None
    encoder_room: int | None
    to_left: bool
    to_right: bool
    per_layer: Any

    @classmethod
    def of(cls, base: Any) -> Facts:
        halves = is_encoder_decoder(base)
        return cls(
            signature=inspect.signature(base.forward),
            encoder_decoder=halves,
            takes_positions=takes_position_ids(base),
            counts_from_mask=counts_from_mask(base),
            counts_from_ids=counts_from_ids(base),
            sums_up_mask=sums_up_mask(base),
            image_positions=has_image_positions(base),
            offset=position_offset(base),
            room=position_room(base.get_decoder() if halves else base),
            encoder_room=position_room(base.get_encoder()) if halves else None,
            to_left=pools_last_token(base),
            to_right=pools_first_token(base),
            per_layer=per_layer_table(base),
        )

    def takes(self, name: str) -> bool:
        """Whether the base's forward names this argument."""
        return name in self.signature.parameters


def decoder_config(base: Any) -> Any:
    """The configuration of a base's text decoder."""
    config = base.config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
