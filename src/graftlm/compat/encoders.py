"""HF PEFT's modules behind virtual tokens, in its signatures, to be built without a wrapper.

`model.prompt_encoder[name]` holds the forms without indices that the methods use; they count as instances.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..methods import p_tuning, prefix_tuning, soft_prompt
from ..methods.prompt_tuning import PromptTuningInit
from ..methods.soft_prompt import repeated, text_ids


class Counting(type):
    """The class that a class here is made of counts as it."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.__mro__[1])


def needed(config: Any, *names: str) -> list[Any]:
    """These values of a configuration, which must be there: no base says them here."""
    values = [getattr(config, name) for name in names]
    if missing := [name for name, value in zip(names, values, strict=True) if value is None]:
        raise ConfigError(f"{type(config).__name__} says no {', '.join(missing)}; without a model these must be given.")
    return values


class PromptEmbedding(soft_prompt.PromptEmbedding, metaclass=Counting):
    """Prompt Tuning's table, at the start that its configuration names.

    Args:
        config: a `PromptTuningConfig` with `token_dim` and `num_transformer_submodules`.
        word_embeddings: the base's, for a start at tokens.
    """

    def __init__(self, config: Any, word_embeddings: nn.Module) -> None:
        count, parts, width = needed(config, "num_virtual_tokens", "num_transformer_submodules", "token_dim")
        super().__init__(count * parts, width, "cpu", torch.float32)
        init = config.prompt_tuning_init
        if config.inference_mode or init is PromptTuningInit.RANDOM:
            return
        weight: Any = word_embeddings.weight
        if init is PromptTuningInit.TEXT:
            text, path = config.prompt_tuning_init_text, config.tokenizer_name_or_path
            ids = text_ids(text, path, "prompt_tuning_init_text", **(config.tokenizer_kwargs or {}))
            chosen = torch.tensor(repeated(ids, count * parts))
        else:
            chosen = torch.randint(0, weight.shape[0], (count * parts,))
        with torch.no_grad():
            self.embedding.weight.copy_(word_embeddings(chosen.to(weight.device)))

    def forward(self, indices: Tensor) -> Tensor:  # type: ignore[override]
        """indices [B, P] of virtual tokens -> [B, P, token_dim]."""
        return super().forward()[indices]


class PromptEncoder(p_tuning.PromptEncoder, metaclass=Counting):
    """P-Tuning's table and its network; `config`: a `PromptEncoderConfig` with `token_dim`, `num_transformer_submodules`."""

    def __init__(self, config: Any) -> None:
        count, parts, width = needed(config, "num_virtual_tokens", "num_transformer_submodules", "token_dim")
        super().__init__(count * parts, width, config, "cpu", torch.float32)

    def forward(self, indices: Tensor) -> Tensor:  # type: ignore[override]
        """indices [B, P] of virtual tokens -> [B, P, token_dim]."""
        return super().forward()[indices]


class PrefixEncoder(prefix_tuning.PrefixEncoder, metaclass=Counting):
    """Prefix Tuning's table, with its network under `prefix_projection`; `config`: a `PrefixTuningConfig` with `token_dim`
    and `num_layers`."""

    def __init__(self, config: Any) -> None:
        count, width, layers = needed(config, "num_virtual_tokens", "token_dim", "num_layers")
        out = 2 * layers * width
        projected = config.prefix_projection and not config.inference_mode
        if projected:
            super().__init__(count, width, config.encoder_hidden_size or width, out, "cpu", torch.float32)
        else:
            nn.Module.__init__(self)
            self.embedding = nn.Embedding(count, out)
        self.prefix_projection = projected
        if config.init_weights == "zero":
            last: Any = self.transform[-1] if projected else self.embedding
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def forward(self, indices: Tensor) -> Tensor:  # type: ignore[override]
        """indices [B, P] of virtual tokens -> [B, P, layers * 2 * token_dim]."""
        return (super().forward() if self.prefix_projection else self.embedding.weight)[indices]
