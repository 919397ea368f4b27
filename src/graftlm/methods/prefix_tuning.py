"""Prefix Tuning: trained keys and values in front of every layer's own (arXiv:2101.00190; also P-Tuning v2, 2110.07602).

The file's table is [P, width], width the sum over layers of ``2 * kv_heads * head_dim``; a row holds, layer by layer,
its key and its value (for equal layers HF PEFT's layout [layers * 2, kv_heads, head_dim]). With `prefix_projection`
it is made by ``W2 tanh(W1 e)`` from a table [P, token_dim].

What differs from HF PEFT: shapes come from the modules, not from guesses; works with activation checkpointing; besides
random and zero there is a start from text (the base's own keys and values of it); on encoder-decoder models the
prefix can also stand in the encoder's self-attention (`prefix_in_encoder`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..architectures import encoder_kv_shapes, is_encoder_decoder, kv_shapes, model_dims
from ..errors import ConfigError, UnsupportedError
from ..modes import evaluating
from .base import PeftType, PromptLearningConfig, Site, register
from .fields import Count, also_takes
from .soft_prompt import SoftPrompt, repeated, text_ids

Memory = list[tuple[Tensor, Tensor]]


@also_takes({"peft_version": ...})
@dataclass(kw_only=True)
class PrefixTuningConfig(PromptLearningConfig):
    """Configuration of Prefix Tuning.

    Args:
        prefix_projection: make the prefix by a two-layer network while training.
        encoder_hidden_size: its width; token_dim when None.
        init_weights: None (random), "zero", or "text" (needs init_text and tokenizer_name_or_path; without projection).
        init_text: its keys and values in the base are the start; repeated or cut to num_virtual_tokens.
        tokenizer_name_or_path: whose tokens `init_text` is.
        prefix_in_encoder: encoder-decoder models: a prefix in the encoder's self-attention as well. HF PEFT places it
            in the decoder only, so this makes files of our own.
    """

    init_weights: str | None = None
    encoder_hidden_size: Count | None = None
    prefix_projection: bool = False
    init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    prefix_in_encoder: bool = False

    own_fields: ClassVar[frozenset[str]] = frozenset({"init_text", "tokenizer_name_or_path", "prefix_in_encoder"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PREFIX_TUNING
        if self.init_weights not in (None, "zero", "text"):
            raise ConfigError(f"init_weights={self.init_weights!r}: expected None (random), 'zero' or 'text'.")
        if self.init_weights == "text":
            if not (self.init_text and self.tokenizer_name_or_path):
                raise ConfigError("init_weights='text' needs init_text and tokenizer_name_or_path.")
            if self.prefix_projection:
                raise ConfigError("init_weights='text' sets the prefix itself; use it with prefix_projection=False.")


class PrefixEncoder(nn.Module):
    """The table behind its network: `embedding` [P, token_dim], `transform` to [P, width]. HF PEFT's names."""

    def __init__(self, count: int, token_dim: int, hidden: int, width: int, device: torch.device | str, dtype: torch.dtype):
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(count, token_dim, **options)
        self.transform = nn.Sequential(
            nn.Linear(token_dim, hidden, **options), nn.Tanh(), nn.Linear(hidden, width, **options)
        )

    def forward(self) -> Tensor:
        return self.transform(self.embedding.weight)


class PrefixTuning(SoftPrompt):
    """One prefix in a host."""

    def fill_config(self, host: Site) -> None:
        config: PrefixTuningConfig = self.config  # type: ignore[assignment]
        self.shapes = kv_shapes(host.base)
        self.encoder_shapes: list[tuple[int, int]] = []
        if config.prefix_in_encoder:
            if not is_encoder_decoder(host.base):
                raise ConfigError("prefix_in_encoder=True: this model has no separate encoder; leave it out.")
            self.encoder_shapes = encoder_kv_shapes(host.base)
        heads, head_dim = self.shapes[0]
        config.num_transformer_submodules = config.num_transformer_submodules or (1 + is_encoder_decoder(host.base))
        config.num_layers = config.num_layers or len(self.shapes)
        config.num_attention_heads = config.num_attention_heads or heads
        config.token_dim = config.token_dim or heads * head_dim
        config.encoder_hidden_size = config.encoder_hidden_size or config.token_dim
        self.check_config(host)

    def check_config(self, host: Site) -> None:
        config: PrefixTuningConfig = self.config  # type: ignore[assignment]
        heads, head_dim = self.shapes[0]
        same = len(set(self.shapes)) == 1
        if config.num_layers != len(self.shapes) or (same and config.token_dim != heads * head_dim):
            raise ConfigError(
                f"A prefix of num_layers={config.num_layers}, token_dim={config.token_dim} does not fit: this model's "
                f"{len(self.shapes)} layers keep {heads} x {head_dim} = {heads * head_dim} values a token. Leave both out; "
                f"a file with other numbers belongs to another base model (it has {model_dims(host.base)})."
            )

    @property
    def table_shape(self) -> tuple[int, int]:
        width = sum(2 * heads * dim for heads, dim in self.shapes + self.encoder_shapes)
        return self.config.num_virtual_tokens, width  # type: ignore[attr-defined]

    @property
    def reparameterised(self) -> bool:  # type: ignore[override]
        return self.config.prefix_projection  # type: ignore[attr-defined]

    def build(self, host: Site, for_loading: bool) -> Any:
        config: PrefixTuningConfig = self.config  # type: ignore[assignment]
        rows, width = self.table_shape
        if config.prefix_projection:
            hidden, dim = config.encoder_hidden_size, config.token_dim
            module: Any = PrefixEncoder(rows, dim, hidden, width, host.adapter_device, host.adapter_dtype())  # type: ignore[arg-type]
            last: list[Tensor] = [module.transform[-1].weight, module.transform[-1].bias]
        else:
            module = self.table(host)
            last = [module.embedding.weight]
        if config.init_weights == "zero":
            for tensor in last:
                nn.init.zeros_(tensor)
        elif config.init_weights == "text" and not for_loading:
            with torch.no_grad():
                last[0].copy_(self._from_text(host))
        return module

    def _from_text(self, host: Site) -> Tensor:
        """The base's own keys and values of `init_text`: [P, width]."""
        config: PrefixTuningConfig = self.config  # type: ignore[assignment]
        if is_encoder_decoder(host.base) or not getattr(host.base, "can_generate", lambda: False)():
            raise UnsupportedError("init_weights='text' is for decoder-only language models; use None or 'zero' here.")
        ids = text_ids(config.init_text, config.tokenizer_name_or_path, "init_text")  # type: ignore[arg-type]
        ids = repeated(ids, config.num_virtual_tokens)
        cache, base = DynamicCache(), host.base
        device = next(base.parameters()).device
        with host.without_adapters(), evaluating(base):
            base(input_ids=torch.tensor([ids], device=device), past_key_values=cache, use_cache=True)
        rows = [t[0].transpose(0, 1).flatten(1) for layer in cache.layers for t in (layer.keys, layer.values)]
        return torch.cat(rows, dim=1).to(host.adapter_device)

    def _split(self, host: Site) -> list[Tensor]:
        """Every layer's keys and values in turn, each [kv_heads, P, head_dim]; decoder layers first."""
        shapes = [s for s in self.shapes + self.encoder_shapes for _ in range(2)]
        parts = self.encoder(host)().split([heads * dim for heads, dim in shapes], dim=1)
        return [p.unflatten(1, s).transpose(0, 1) for p, s in zip(parts, shapes, strict=True)]

    def memory(self, host: Site) -> Memory | None:
        parts = self._split(host)
        layers = len(self.shapes)
        if self.config.num_transformer_submodules == 2:  # type: ignore[attr-defined]
            # HF PEFT lays the table out twice and gives every layer four rows of it, of which it uses the first two:
            # layer j takes pair (2j mod layers). Its checkpoints and losses agree only with the same choice.
            return [(parts[2 * i], parts[2 * i + 1]) for i in (2 * j % layers for j in range(layers))]
        return [(parts[2 * j], parts[2 * j + 1]) for j in range(layers)]

    def encoder_memory(self, host: Site) -> Memory | None:
        parts = self._split(host)[2 * len(self.shapes) :]
        return list(zip(parts[::2], parts[1::2], strict=True)) or None

    def virtual_tokens(self, host: Site) -> Tensor | None:
        return None


register(PeftType.PREFIX_TUNING, PrefixTuningConfig, PrefixTuning)
