"""What Prompt Tuning, P-Tuning and Prefix Tuning share: a trained table of virtual tokens, and its file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import backbone_embeddings, is_encoder_decoder, model_dims
from ..errors import ConfigError
from ..modes import evaluating
from .base import Method, PromptLearningConfig, Site


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

    def attach(self, host: Site, *, for_loading: bool = False) -> None:
        self.fill_config(host)
        encoder = self.table(host) if self.config.inference_mode else self.build(host, for_loading)
        host.prompt_encoder[self.name] = encoder

    def fill_config(self, host: Site) -> None:
        """Read what the configuration leaves open from the base model."""
        config: PromptLearningConfig = self.config  # type: ignore[assignment]
        dims = model_dims(host.base)
        config.num_transformer_submodules = config.num_transformer_submodules or (1 + is_encoder_decoder(host.base))
        config.num_layers = config.num_layers or dims.layers
        config.num_attention_heads = config.num_attention_heads or dims.heads
        if config.token_dim is None:  # not always the hidden size: OPT-350m, ALBERT and ELECTRA have narrower embeddings
            config.token_dim = backbone_embeddings(host.base).weight.shape[1]
        self.check_config(host)

    def check_config(self, host: Site) -> None:
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

    def table(self, host: Site) -> PromptEmbedding:
        """The inference form."""
        rows, width = self.table_shape
        return PromptEmbedding(rows, width, host.adapter_device, host.adapter_dtype())

    def build(self, host: Site, for_loading: bool) -> Any:
        """The trained form."""
        raise NotImplementedError

    def encoder(self, host: Site) -> Any:
        return host.prompt_encoder[self.name]

    def detach(self, host: Site) -> None:
        del host.prompt_encoder[self.name]

    def named_parameters(self, host: Site) -> Iterator[tuple[str, nn.Parameter]]:
        for key, parameter in self.encoder(host).named_parameters():
            yield f"prompt_encoder.{self.name}.{key}", parameter

    def virtual_tokens(self, host: Site) -> Tensor | None:
        return self.encoder(host)()[: self.config.num_virtual_tokens]  # type: ignore[attr-defined]

    def tensors(self, host: Site) -> dict[str, Tensor]:
        encoder = self.encoder(host)
        with evaluating(encoder), torch.no_grad():  # what is kept must not hold one random draw of dropout
            return {"prompt_embeddings": encoder().detach()}

    def expected_shapes(self, host: Site) -> dict[str, torch.Size]:
        return {"prompt_embeddings": torch.Size(self.table_shape)}

    def load(self, host: Site, tensors: dict[str, Tensor]) -> None:
        """Take the table. A reparameterised encoder cannot be found back from it: training goes on with the bare table."""
        if not isinstance(self.encoder(host), PromptEmbedding):
            host.prompt_encoder[self.name] = self.table(host).train(self.encoder(host).training)
        with torch.no_grad():
            self.encoder(host).embedding.weight.copy_(tensors["prompt_embeddings"])

    def training_tensors(self, host: Site) -> dict[str, Tensor]:
        encoder = self.encoder(host)
        if isinstance(encoder, PromptEmbedding):
            return {}
        return {key: value.detach() for key, value in encoder.state_dict().items()}

    def load_training(self, host: Site, tensors: dict[str, Tensor]) -> None:
        if isinstance(self.encoder(host), PromptEmbedding) and set(tensors) != {"embedding.weight"}:
            host.prompt_encoder[self.name] = self.build(host, for_loading=True)
        self.encoder(host).load_state_dict(tensors)


@torch.no_grad()
def start_embeddings(host: Site, count: int, ids: list[int] | None = None) -> Tensor:
    """The base's embeddings of tokens, repeated or cut to their number, or of random ones: [count, H]."""
    embeddings = backbone_embeddings(host.base)
    if ids is None:
        chosen = torch.randint(0, embeddings.weight.shape[0], (count,))
    else:
        chosen = torch.tensor(repeated(ids, count))
    return embeddings(chosen.to(embeddings.weight.device))


def text_ids(text: str, tokenizer_name_or_path: str, field: str, **options: Any) -> list[int]:
    """Token ids of a start text. ConfigError, which names the text's field, where it has none."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(tokenizer_name_or_path, **{**options, "trust_remote_code": False})(text)["input_ids"]
    if not ids:
        raise ConfigError(f"{field}={text!r} has no tokens.")
    return ids


def repeated(ids: list[int], count: int) -> list[int]:
    """The ids again and again, up to a number of them."""
    return (ids * (count // len(ids) + 1))[:count]
