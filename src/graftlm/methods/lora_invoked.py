"""`alora_invocation_tokens` in a configuration; where such an adapter acts is found in `passes.invoked`."""

from __future__ import annotations

import warnings
from typing import Any

from ..errors import ConfigError
from .base import TaskType


def check_invocation(config: Any) -> None:
    """ConfigError for `alora_invocation_tokens` that cannot be looked for, and what does not go with them."""
    tokens = config.alora_invocation_tokens
    if tokens is None:
        return
    if not tokens or min(tokens) < 0:
        raise ConfigError(
            f"alora_invocation_tokens={tokens!r}: expected the token ids of a sequence, at least one, none below 0 "
            "(tokenizer(text, add_special_tokens=False).input_ids)."
        )
    refused = {
        "use_dora=True": config.use_dora,
        f"modules_to_save={config.modules_to_save!r}": config.modules_to_save,
    }
    for text in (text for text, on in refused.items() if on):
        raise ConfigError(f"alora_invocation_tokens does not go with {text}: what is before them is the plain base's.")
    if config.task_type is not TaskType.CAUSAL_LM:
        warnings.warn("alora_invocation_tokens is meant for task_type='CAUSAL_LM'.", stacklevel=4)
