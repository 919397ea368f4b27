"""Cartridges: a long text's keys and values as a trained prefix (arXiv:2506.06266).

``K_l = [k_l; own keys]``, ``V_l = [v_l; own values]`` in every layer l, as in Prefix Tuning. The table [P, width] starts at
random, or as what the base keeps of a text; its first rows, which attention leans on, are not trained.

Field names, defaults, maths and files are HF PEFT's (its `CartridgeConfig`; the table is Prefix Tuning's). What differs:
several are active together and in mixed batches, side by side, so that composing their files is seldom needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import AdapterError, ConfigError, UnsupportedError
from ..files import WEIGHTS_NAME, find_file
from ..modes import evaluating
from .base import PeftConfig, PeftType, PromptLearningConfig, Site, register
from .fields import Limit, also_takes
from .prefix_tuning import PrefixTuning

Natural = Annotated[int, Limit("a whole number from 0", lambda value: value >= 0)]


@also_takes({"peft_version": ...})
@dataclass(kw_only=True)
class CartridgeConfig(PromptLearningConfig):
    """Configuration of a cartridge.

    Args:
        num_frozen_tokens: how many of the first entries are not trained.
    """

    num_frozen_tokens: Natural = 1

    # what a prefix may be besides
    prefix_projection: ClassVar[bool] = False
    prefix_in_encoder: ClassVar[bool] = False
    encoder_hidden_size = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.CARTRIDGE
        if self.num_frozen_tokens > self.num_virtual_tokens:
            raise ConfigError(
                f"num_frozen_tokens={self.num_frozen_tokens} of num_virtual_tokens={self.num_virtual_tokens}: not more."
            )


class CartridgeTable(nn.Module):
    """The table in two parts: `frozen_embedding` and `trainable_embedding` [.., width], HF PEFT's names."""

    frozen_embedding: Tensor

    def __init__(self, frozen: int, trained: int, width: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.register_buffer("frozen_embedding", torch.empty(frozen, width, **options).normal_())
        self.trainable_embedding = nn.Parameter(torch.empty(trained, width, **options).normal_())

    def forward(self) -> Tensor:
        return torch.cat((self.frozen_embedding, self.trainable_embedding))

    @torch.no_grad()
    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Take a whole table [P, width]."""
        wanted = len(self.frozen_embedding) + len(self.trainable_embedding), self.trainable_embedding.shape[1]
        if prompt_embeddings.shape != wanted:
            raise ConfigError(
                f"The prefix is {tuple(prompt_embeddings.shape)}, expected {wanted}: entries, values of all layers."
            )
        count = len(self.frozen_embedding)
        self.frozen_embedding.copy_(prompt_embeddings[:count])
        self.trainable_embedding.copy_(prompt_embeddings[count:])


class Cartridge(PrefixTuning):
    """One cartridge in a host."""

    reparameterised = False  # type: ignore[assignment]

    def table(self, host: Site) -> Any:
        (rows, width), frozen = self.table_shape, self.config.num_frozen_tokens  # type: ignore[attr-defined]
        return CartridgeTable(frozen, rows - frozen, width, host.adapter_device, host.adapter_dtype())

    def build(self, host: Site, for_loading: bool) -> Any:
        return self.table(host)

    def load(self, host: Site, tensors: dict[str, Tensor]) -> None:
        self.encoder(host).load_prompt_embeddings(tensors["prompt_embeddings"])

    def training_tensors(self, host: Site) -> dict[str, Tensor]:
        return {}


register(PeftType.CARTRIDGE, CartridgeConfig, Cartridge)


# -- start values --------------------------------------------------------------------------------------------------------
def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """The first entries of a cache, of one row, as a prefix's table [P, width].

    Args:
        past_key_values: a transformers cache, or keys and values by layer, each [1, kv_heads, T, head_dim].
    """
    if hasattr(past_key_values, "layers"):
        layers = [(layer.keys, layer.values) for layer in past_key_values.layers]
    else:
        layers = [(layer[0], layer[1]) for layer in past_key_values]
    parts = []
    for number, tensor in ((i, t) for i, layer in enumerate(layers) for t in layer):
        if tensor.dim() != 4 or tensor.shape[0] != 1 or tensor.shape[2] < num_virtual_tokens:
            raise ConfigError(
                f"past_key_values, layer {number}: {tuple(tensor.shape)}, expected [1, kv_heads, {num_virtual_tokens} or "
                "more, head_dim], of one text that is long enough."
            )
        parts.append(tensor[0, :, :num_virtual_tokens].transpose(0, 1).flatten(1))
    if not parts:
        raise ConfigError("past_key_values is empty: give the cache of a pass.")
    return torch.cat(parts, dim=1)


@torch.no_grad()
def initialize_kv_prefix_from_past_key_values(
    model: Any, *, past_key_values: Any, adapter_name: str | None = None, num_virtual_tokens: int | None = None
) -> Tensor:
    """Start a cartridge or a prefix (the active one) as the first entries of a cache; returns its table [P, width].

    Raises:
        UnsupportedError: another method, or a prefix behind a network.
    """
    name = adapter_name or model.active_adapter
    model._known(name)
    method = model.methods[name]
    if not isinstance(method, PrefixTuning) or method.config.prefix_projection:  # type: ignore[attr-defined]
        raise UnsupportedError(
            f"Adapter {name!r} holds no keys and values as they are: expected a cartridge, or a prefix without "
            "prefix_projection."
        )
    count = num_virtual_tokens or method.config.num_virtual_tokens  # type: ignore[attr-defined]
    table = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=count)
    if table.shape != torch.Size(method.table_shape):
        raise ConfigError(f"The cache makes a prefix of {tuple(table.shape)}, adapter {name!r} has {method.table_shape}.")
    method.load(model, {"prompt_embeddings": table})
    return table


def initialize_kv_prefix_from_text(
    model: Any, tokenizer: Any, *, text: str, adapter_name: str | None = None, num_virtual_tokens: int | None = None,
    use_chat_template: bool = True, max_length: int | None = None,
) -> Tensor:  # fmt: skip
    """The same from a text, through the bare base: its first tokens' keys and values.

    Args:
        use_chat_template: the text as a system message, where the tokenizer has a template.
        max_length: tokens of the text that are read at most.
    """
    if use_chat_template and getattr(tokenizer, "chat_template", None):
        message = [{"role": "system", "content": text}]
        ids = tokenizer.apply_chat_template(message, tokenize=True, add_generation_prompt=False, return_dict=False)
    else:
        ids = tokenizer(text)["input_ids"]
    given = torch.tensor([ids[:max_length]], device=model.adapter_device)
    with model.without_adapters(), evaluating(model.base):
        cache = model.base(input_ids=given, attention_mask=torch.ones_like(given), use_cache=True).past_key_values
    return initialize_kv_prefix_from_past_key_values(
        model, past_key_values=cache, adapter_name=adapter_name, num_virtual_tokens=num_virtual_tokens
    )


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | Path], *, output_path: str | Path, safe_serialization: bool = True
) -> None:
    """Write the cartridges of several directories as one, side by side; the first one's frozen entries stay so."""
    if not safe_serialization:
        raise UnsupportedError(
            "safe_serialization=False would write a pickle file; weights are written as safetensors only."
        )
    configs: list[Any] = [PeftConfig.from_pretrained(path) for path in adapter_paths]
    if len(configs) < 2:
        raise AdapterError(f"{len(configs)} adapters: expected two or more to compose.")
    for path, config in zip(adapter_paths, configs, strict=True):
        if not isinstance(config, CartridgeConfig):
            raise AdapterError(f"{path} is {config.peft_type.value}, expected cartridges.")
        for name in ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"):
            if getattr(config, name) != getattr(configs[0], name):
                raise AdapterError(f"{path}: {name}={getattr(config, name)}, the first has {getattr(configs[0], name)}.")
    tables = [load_file(find_file(path, WEIGHTS_NAME))["prompt_embeddings"] for path in adapter_paths]
    made = replace(configs[0], num_virtual_tokens=sum(len(t) for t in tables))
    made.save_pretrained(output_path, inference_mode=True)
    save_file({"prompt_embeddings": torch.cat(tables)}, Path(output_path, WEIGHTS_NAME))
