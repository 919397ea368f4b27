"""Prompts in, completions out: `generate` of transformers behind one set of options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..architectures import end_ids
from ..errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen and when to stop.

    Args:
        max_new_tokens: longest completion.
        temperature: 0 takes the likeliest token (greedy); above, samples.
        top_p: samples from the likeliest tokens that together have this probability.
        repetition_penalty: above 1 makes tokens that occurred less likely.
        seed: of the random numbers, set before every call: the same call gives the same text.
        stop: texts that end a completion (they are cut off it).

    Raises:
        ConfigError: a value out of its range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        limits = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 (greedy) or above"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
            "stop": (all(self.stop), "texts that are not empty"),
        }
        for name, (fine, expected) in limits.items():
            if not fine:
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected {expected}.")

    def options(self, tokenizer: PreTrainedTokenizerBase, model: Any = None) -> dict[str, Any]:
        """Keyword arguments of transformers' `generate`. The padding token ends a completion as the end token does.

        So do the next speakers' tokens where the tokenizer says so (`answer_end_ids`, ChatGLM's), and the end tokens of the
        model's generation settings.
        """
        ends, others = end_tokens(tokenizer, model)
        options: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.temperature > 0,
            "repetition_penalty": self.repetition_penalty,
            "eos_token_id": others + ends or None,
            "pad_token_id": ends[-1] if ends else None,
        }
        if self.temperature > 0:
            options |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        if self.stop:
            options |= {"stop_strings": list(self.stop), "tokenizer": tokenizer}
        return options


def end_tokens(tokenizer: Any, model: Any) -> tuple[list[int], list[int]]:
    """Tokens that end a completion: the tokenizer's end and padding tokens, and the others (see `Sampling.options`)."""
    ends = [i for name in ("eos_token_id", "pad_token_id") if (i := getattr(tokenizer, name, None)) is not None]
    more = [*(getattr(tokenizer, "answer_end_ids", None) or []), *end_ids(model)]
    return ends, [i for i in dict.fromkeys(more) if i not in ends]


def complete(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[int]],
    sampling: Sampling | None = None,
    *,
    batch_size: int = 16,
    streamer: Any = None,
) -> list[str]:
    """Completions of the prompts, one each, in their order.

    Args:
        model: a `PeftModel` (its active adapters apply) or a plain transformers model.
        streamer: transformers' streamer, for one prompt.
    """
    import torch

    sampling = sampling or Sampling()
    options = sampling.options(tokenizer, model)
    torch.manual_seed(sampling.seed)
    texts: list[str] = []
    for start in range(0, len(prompts), batch_size):
        ids, mask = encode(tokenizer, prompts[start : start + batch_size], model.device)
        with torch.inference_mode():
            out = model.generate(input_ids=ids, attention_mask=mask, streamer=streamer, **options)
        skip = 0 if model.config.is_encoder_decoder else ids.shape[1]
        texts += [cut(t, sampling.stop) for t in tokenizer.batch_decode(out[:, skip:], skip_special_tokens=True)]
    return texts


def encode(tokenizer: Any, prompts: Sequence[str | Sequence[int]], device: Any) -> tuple[Tensor, Tensor]:
    """Token ids and mask of texts or token ids, both [B, T], padded on the left whatever the tokenizer's own side is."""
    import torch

    rows = [tokenizer(p)["input_ids"] if isinstance(p, str) else list(p) for p in prompts]
    empty = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    rows = [row or [empty] for row in rows]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    longest = max(len(row) for row in rows)
    ids = [[pad] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop texts."""
    found = [i for s in stop if (i := text.find(s)) >= 0]
    return text[: min(found)] if found else text
