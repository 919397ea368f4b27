"""One example as text, and the token that ends its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from graftlm.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
End = Literal["eos", "pad", "none"]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One example as text. ``special_tokens``: whether the tokenizer's leading tokens (BOS) go in front.

    ``prompt_ids`` are the prompt's tokens where its text alone does not tell them (a chat through a template).
    """

    prompt: str
    target: str
    special_tokens: bool = True
    prompt_ids: tuple[int, ...] | None = None


def end_token_id(tokenizer: PreTrainedTokenizerBase, end: End) -> int | None:
    """Id of the token that ``end`` stands for; None for ``none``. DataError where the tokenizer lacks it."""
    if end == "none":
        return None
    pad = tokenizer.pad_token_id if end == "pad" else None
    found: int | None = tokenizer.eos_token_id if pad is None else pad
    if found is None:
        raise DataError(
            f"answers should end with the {end} token, but the tokenizer has none; "
            "set tokenizer.eos_token, or pass end='none'"
        )
    return found
