"""Prompt Tuning: trained virtual tokens in front of the input embeddings (arXiv:2104.08691).

Table ``E`` [P, H] (twice P on encoder-decoder models, HF PEFT's layout: the second half is kept, only the first enters).

What differs from HF PEFT: virtual tokens stand next to the real ones in padded rows; a configuration's
`tokenizer_kwargs` cannot switch on remote code.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..errors import ConfigError
from .base import PeftType, PromptLearningConfig, Site, as_enum, register
from .fields import also_takes
from .soft_prompt import SoftPrompt, start_embeddings, text_ids


class PromptTuningInit(str, enum.Enum):
    """Start values of the virtual tokens."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@also_takes({"peft_version": ...})
@dataclass(kw_only=True)
class PromptTuningConfig(PromptLearningConfig):
    """Configuration of Prompt Tuning.

    Args:
        prompt_tuning_init: RANDOM (HF PEFT's default, the weakest), SAMPLE_VOCAB (embeddings of random tokens) or TEXT.
        prompt_tuning_init_text: the text for TEXT; repeated or cut to the number of virtual tokens.
        tokenizer_name_or_path: whose tokens TEXT is.
        tokenizer_kwargs: for `AutoTokenizer.from_pretrained`; `trust_remote_code` is refused.
    """

    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict | None = None

    inits: ClassVar[type[enum.Enum]] = PromptTuningInit

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PROMPT_TUNING
        self.prompt_tuning_init = as_enum(self.inits, self.prompt_tuning_init, "prompt_tuning_init")
        text_init = self.prompt_tuning_init == PromptTuningInit.TEXT
        if text_init and not (self.tokenizer_name_or_path and self.prompt_tuning_init_text):
            raise ConfigError(
                f"prompt_tuning_init=TEXT needs tokenizer_name_or_path (got {self.tokenizer_name_or_path!r}) and "
                f"prompt_tuning_init_text (got {self.prompt_tuning_init_text!r})."
            )
        if self.tokenizer_kwargs and not text_init:
            raise ConfigError("tokenizer_kwargs is only for prompt_tuning_init=TEXT.")
        if (self.tokenizer_kwargs or {}).get("trust_remote_code"):
            raise ConfigError("tokenizer_kwargs switches on trust_remote_code; a configuration never runs code. Remove it.")


class PromptTuning(SoftPrompt):
    """One prompt-tuning adapter in a host."""

    def build(self, host: Site, for_loading: bool) -> Any:
        config: PromptTuningConfig = self.config  # type: ignore[assignment]
        module = self.table(host)
        if for_loading or config.prompt_tuning_init not in (PromptTuningInit.TEXT, PromptTuningInit.SAMPLE_VOCAB):
            return module
        ids = None
        if config.prompt_tuning_init == PromptTuningInit.TEXT:
            text, path = config.prompt_tuning_init_text, config.tokenizer_name_or_path
            ids = text_ids(text, path, "prompt_tuning_init_text", **(config.tokenizer_kwargs or {}))  # type: ignore[arg-type]
        with torch.no_grad():
            module.embedding.weight.copy_(start_embeddings(host, module.embedding.num_embeddings, ids))
        return module


register(PeftType.PROMPT_TUNING, PromptTuningConfig, PromptTuning)
