"""Prompt Tuning: trained virtual tokens in front of the input embeddings (arXiv:2104.08691).

Table ``E`` [P, H] (twice P on encoder-decoder models, HF PEFT's layout: the second half is kept, only the first enters).

What differs from HF PEFT: virtual tokens stand next to the real ones in padded rows; a configuration's
`tokenizer_kwargs` cannot switch on remote code.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..architectures import backbone_embeddings, is_encoder_decoder, model_dims
from ..errors import ConfigError
from .base import Method, PeftType, PromptLearningConfig, as_enum, register

if TYPE_CHECKING:
    from .. import model as wrapper


class PromptTuningInit(str, enum.Enum):
    """Start values of the virtual tokens."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


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

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PROMPT_TUNING
        self.prompt_tuning_init = as_enum(PromptTuningInit, self.prompt_tuning_init, "prompt_tuning_init")
        text_init = self.prompt_tuning_init is PromptTuningInit.TEXT
        if text_init and not (self.tokenizer_name_or_path and self.prompt_tuning_init_text):
            raise ConfigError(
                f"prompt_tuning_init=TEXT needs tokenizer_name_or_path (got {self.tokenizer_name_or_path!r}) and "
                f"prompt_tuning_init_text (got {self.prompt_tuning_init_text!r})."
            )
        if self.tokenizer_kwargs and not text_init:
            raise ConfigError("tokenizer_kwargs is only for prompt_tuning_init=TEXT.")
        if (self.tokenizer_kwargs or {}).get("trust_remote_code"):
            raise ConfigError("tokenizer_kwargs switches on trust_remote_code; a configuration never runs code. Remove it.")


class PromptEmbedding(nn.Module):
    """The trained table: `embedding.weight` [virtual tokens, H]."""

    def __init__(self, count: int, width: int, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding = nn.Embedding(count, width, device=device, dtype=dtype)

    def forward(self) -> Tensor:
        return self.embedding.weight


class SoftPrompt(Method):
    """What Prompt Tuning, P-Tuning and Prefix Tuning share: one encoder module in `host.prompt_encoder`.

    Its inference form is a bare table (`PromptEmbedding`), and that is what the file holds as `prompt_embeddings`.
    """

    file_prefix = "base_model."
    #: whether the trained module is more than the table, so that further training needs a file of its own
    reparameterised = False

    def attach(self, host: wrapper.PeftModel, *, for_loading: bool = False) -> None:
        self.fill_config(host)
        encoder = self.table(host) if self.config.inference_mode else self.build(host, for_loading)
        host.prompt_encoder[self.name] = encoder

    def fill_config(self, host: wrapper.PeftModel) -> None:
        """Read what the configuration leaves open from the base model."""
        config: PromptLearningConfig = self.config  # type: ignore[assignment]
        dims = model_dims(host.base)
        config.num_transformer_submodules = config.num_transformer_submodules or (1 + is_encoder_decoder(host.base))
        config.num_layers = config.num_layers or dims.layers
        config.num_attention_heads = config.num_attention_heads or dims.heads
        config.token_dim = config.token_dim or dims.hidden
        self.check_config(host)

    def check_config(self, host: wrapper.PeftModel) -> None:
        config: PromptLearningConfig = self.config  # type: ignore[assignment]
        width = backbone_embeddings(host.base).weight.shape[1]
        if config.token_dim != width:
            raise ConfigError(
                f"token_dim={config.token_dim}: the input embeddings of this model are {width} wide. Leave token_dim out; "
                "a file with another width belongs to another base model."
            )

    @property
    def table_shape(self) -> tuple[int, int]:
        config: PromptLearningConfig = self.config  # type: ignore[assignment]
        return config.num_virtual_tokens * config.num_transformer_submodules, config.token_dim  # type: ignore[operator, return-value]

    def table(self, host: wrapper.PeftModel) -> PromptEmbedding:
        """The inference form."""
        rows, width = self.table_shape
        return PromptEmbedding(rows, width, host.adapter_device, host.adapter_dtype())

    def build(self, host: wrapper.PeftModel, for_loading: bool) -> Any:
        """The trained form."""
        raise NotImplementedError

    def encoder(self, host: wrapper.PeftModel) -> Any:
        return host.prompt_encoder[self.name]

    def detach(self, host: wrapper.PeftModel) -> None:
        del host.prompt_encoder[self.name]

    def named_parameters(self, host: wrapper.PeftModel) -> Iterator[tuple[str, nn.Parameter]]:
        for key, parameter in self.encoder(host).named_parameters():
            yield f"prompt_encoder.{self.name}.{key}", parameter

    def virtual_tokens(self, host: wrapper.PeftModel) -> Tensor | None:
        return self.encoder(host)()[: self.config.num_virtual_tokens]  # type: ignore[attr-defined]

    def tensors(self, host: wrapper.PeftModel) -> dict[str, Tensor]:
        encoder = self.encoder(host)
        training = encoder.training
        encoder.eval()  # what is kept must not hold one random draw of dropout
        try:
            with torch.no_grad():
                return {"prompt_embeddings": encoder().detach()}
        finally:
            encoder.train(training)

    def expected_shapes(self, host: wrapper.PeftModel) -> dict[str, torch.Size]:
        return {"prompt_embeddings": torch.Size(self.table_shape)}

    def load(self, host: wrapper.PeftModel, tensors: dict[str, Tensor]) -> None:
        """Take the table. A reparameterised encoder cannot be found back from it: training goes on with the bare table."""
        if not isinstance(self.encoder(host), PromptEmbedding):
            host.prompt_encoder[self.name] = self.table(host).train(self.encoder(host).training)
        with torch.no_grad():
            self.encoder(host).embedding.weight.copy_(tensors["prompt_embeddings"])

    def training_tensors(self, host: wrapper.PeftModel) -> dict[str, Tensor]:
        encoder = self.encoder(host)
        if isinstance(encoder, PromptEmbedding):
            return {}
        return {key: value.detach() for key, value in encoder.state_dict().items()}

    def load_training(self, host: wrapper.PeftModel, tensors: dict[str, Tensor]) -> None:
        if isinstance(self.encoder(host), PromptEmbedding) and set(tensors) != {"embedding.weight"}:
            host.prompt_encoder[self.name] = self.build(host, for_loading=True)
        self.encoder(host).load_state_dict(tensors)


class PromptTuning(SoftPrompt):
    """One prompt-tuning adapter in a host."""

    def build(self, host: wrapper.PeftModel, for_loading: bool) -> Any:
        config: PromptTuningConfig = self.config  # type: ignore[assignment]
        module = self.table(host)
        if for_loading or config.prompt_tuning_init is PromptTuningInit.RANDOM:
            return module
        embeddings = backbone_embeddings(host.base)
        rows = module.embedding.num_embeddings
        if config.prompt_tuning_init is PromptTuningInit.TEXT:
            ids = text_ids(config, rows)
        else:
            ids = torch.randint(0, embeddings.weight.shape[0], (rows,))
        with torch.no_grad():
            module.embedding.weight.copy_(embeddings(ids.to(embeddings.weight.device)))
        return module


def text_ids(config: PromptTuningConfig, count: int) -> Tensor:
    """Token ids [count] of the start text, repeated or cut."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        config.tokenizer_name_or_path, **{**(config.tokenizer_kwargs or {}), "trust_remote_code": False}
    )
    ids = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    if not ids:
        raise ConfigError(f"prompt_tuning_init_text={config.prompt_tuning_init_text!r} has no tokens.")
    return torch.tensor((ids * (count // len(ids) + 1))[:count])


register(PeftType.PROMPT_TUNING, PromptTuningConfig, PromptTuning)
