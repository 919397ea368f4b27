"""Names and habits of the families, as far as they cannot be read from the modules."""

from __future__ import annotations

import copy
import inspect
import re
import sys
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..errors import TargetError, UnsupportedError, nearest
from .walk import base_modules

_QV = ["q_proj", "v_proj"]
_FUSED = ["query_key_value"]

Targets = dict[str, list[str] | str]

# Default LoRA targets by `config.model_type`: HF PEFT's table, and families that it lacks.
LORA_TARGETS: Targets = {
    "bart": _QV, "bert": ["query", "value"], "blip-2": ["q", "v", *_QV], "bloom": _FUSED, "btlm": ["c_proj", "c_attn"],
    "chatglm": _FUSED, "codegen": ["qkv_proj"], "deberta": ["in_proj"], "deberta-v2": ["query_proj", "value_proj"],
    "electra": ["query", "value"], "falcon": _FUSED, "RefinedWeb": _FUSED, "RefinedWebModel": _FUSED, "gemma": _QV,
    "gemma2": _QV, "gemma3": _QV, "gemma3_text": _QV, "gemma4": r".*language_model\..*\.(q_proj|v_proj)", "glm": _QV,
    "glm4": _QV, "gpt2": ["c_attn"], "gpt_bigcode": ["c_attn"], "gpt_neo": _QV, "gpt_neox": _FUSED, "gptj": _QV,
    "layoutlm": ["query", "value"], "llama": _QV, "llama4": _QV, "mbart": _QV, "mistral": _QV, "mixtral": _QV,
    "mpt": ["Wqkv"], "mt5": ["q", "v"], "nemotron_h": ["q_proj", "k_proj", "v_proj", "o_proj"], "olmo2": _QV, "opt": _QV,
    "pegasus": _QV, "phi": ["q_proj", "v_proj", "fc1", "fc2"], "phi3": ["qkv_proj"], "qwen2": _QV, "qwen3": _QV,
    "qwen3_moe": _QV, "roberta": ["query", "value"], "rwkv": ["key", "value", "receptance", "output"],
    "rwkv7": ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"], "stablelm": _QV, "t5": ["q", "v"],
    "umt5": ["q", "v"], "xlm-roberta": ["query", "value"],
}  # fmt: skip


def model_type(base: nn.Module) -> str:
    """`config.model_type` of a model ("" where it has none)."""
    return getattr(getattr(base, "config", None), "model_type", "") or ""


def is_plain(base: nn.Module) -> bool:
    """Whether a base is any torch module: without a configuration of transformers nothing is known of what it reads and
    gives, so calls go through as they are."""
    return not isinstance(getattr(base, "config", None), PreTrainedConfig)


def target_family(base: nn.Module, table: Targets) -> str | None:
    """The family whose entry a model takes: its own, or Llama's where its modules have all of that entry's names."""
    kind, usual = model_type(base), table["llama"]
    if not kind or kind in table:
        return kind or None
    return "llama" if set(usual) <= {name.rpartition(".")[2] for name, _ in base.named_modules()} else None


def default_targets(base: nn.Module, table: Targets, config: str) -> list[str] | str:
    """The entry of a table for a model; TargetError, naming the configuration's class, for a family without."""
    if (family := target_family(base, table)) is not None:
        return copy.copy(table[family])
    kind = model_type(base)
    if not kind:
        raise TargetError(
            f"There are no default target_modules for {type(base).__name__}: it has no configuration of a family that has "
            f"some. Name them in {config}(target_modules=[...]), or use target_modules='all-linear'."
        )
    raise TargetError(
        f"There are no default target_modules for model type {kind!r}{nearest(kind, table)}. "
        f"Name them in {config}(target_modules=[...]), or use target_modules='all-linear'."
    )


def is_encoder_decoder(base: nn.Module) -> bool:
    says = bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
    return says and hasattr(base, "get_encoder")  # a module around such models is any module


@dataclass(frozen=True, kw_only=True)
class Dims:
    """Sizes that a soft prompt's configuration records."""

    hidden: int
    layers: int
    heads: int | None


def model_dims(base: Any) -> Dims:
    """Hidden size, layers and heads from the configuration, by the names that families use for them; models without
    attention (Mamba) have no heads."""
    config = base.config
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()

    def optional(*names: str) -> int | None:
        return next((v for n in names if isinstance(v := getattr(config, n, None), int)), None)

    def first(what: str, *names: str) -> int:
        if (value := optional(*names)) is None:
            raise UnsupportedError(f"Cannot read the {what} of {type(base).__name__} from its configuration ({names}).")
        return value

    return Dims(
        hidden=first("hidden size", "hidden_size", "n_embd", "d_model"),
        layers=first("number of layers", "num_hidden_layers", "num_layers", "n_layer"),
        heads=optional("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
    )


def token_embeddings(base: Any) -> Any:
    """The module that turns token ids into input embeddings (of the encoder, where there are two halves); None for a model
    that reads features or images instead (Whisper, Wav2Vec2, ViT)."""
    for half in (base.get_encoder(), base) if is_encoder_decoder(base) else (base,):
        try:
            found = half.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            return None
        if found is not None:
            weight = getattr(found, "weight", None)
            return found if weight is not None and weight.dim() == 2 else None
    return None


def backbone_embeddings(base: nn.Module) -> Any:
    """`token_embeddings`; UnsupportedError for a model without."""
    if (embeddings := token_embeddings(base)) is None:
        raise UnsupportedError(
            f"{type(base).__name__} has no embeddings of input tokens; virtual tokens need them. Use LoRA or bottleneck "
            "adapters."
        )
    return embeddings


def takes_position_ids(base: nn.Module) -> bool:
    """Whether positions can be handed to the model. (ALiBi and relative-position models count from the mask.)"""
    return "position_ids" in inspect.signature(base.forward).parameters


def counts_from_mask(base: nn.Module) -> bool:
    """Whether positions can follow the attention mask: handed in, or (ALiBi of Bloom and Falcon) summed up from it."""
    return takes_position_ids(base) or model_type(base) in ("bloom", "falcon")


def sums_up_mask(base: nn.Module) -> bool:
    """Whether the model itself counts positions by the places that the mask lets in (OPT, BioGPT)."""
    tables = (m for path, m in base_modules(base) if path.endswith("embed_positions"))
    return any("attention_mask" in inspect.signature(table.forward).parameters for table in tables)


def has_image_positions(base: nn.Module) -> bool:
    """Whether the model makes positions of several axes (time, height, width) itself, from images among the tokens."""
    return any(hasattr(module, "get_rope_index") for _, module in base_modules(base))


def finds_features_by_embedding(base: nn.Module) -> bool:
    """Whether images or sound find their places among given embeddings (by transformers' methods for that), not ids only."""
    names = ("get_placeholder_mask", "inputs_merger")
    return any(hasattr(module, name) for _, module in base_modules(base) for name in names)


def position_offset(base: nn.Module) -> int:
    """Position of a row's first token: RoBERTa and its kin count from `padding_idx + 1`, a few from 2, most from 0."""
    if (counting := _counts_from_ids(base)) is not None:
        return int(counting.padding_idx) + 1
    for _, module in base_modules(base):
        table = module._buffers.get("position_ids")
        if table is not None and table.numel() and table.device.type != "meta" and not table.is_floating_point():
            return int(table.flatten()[0])
    return 0


def counts_from_ids(base: nn.Module) -> bool:
    """Whether the model counts positions itself by which ids are not padding, where none are handed in."""
    return _counts_from_ids(base) is not None


def _counts_from_ids(base: nn.Module) -> Any:
    """The embeddings that do so: by a method or, in some files of transformers (MPNet, ESM, LUKE), by a function."""
    count = "create_position_ids_from_input_ids"
    for _, module in base_modules(base):
        beside = hasattr(module, "position_embeddings") and hasattr(sys.modules.get(type(module).__module__), count)
        if (beside or hasattr(module, count)) and getattr(module, "padding_idx", None) is not None:
            return module
    return None


def position_tables(half: nn.Module) -> list[nn.Module]:
    """The modules of an encoder or decoder that give each place its absolute position's vector."""
    found = [m for _, m in base_modules(half) if "PositionalEmbedding" in type(m).__name__]
    return [m for m in found if hasattr(m, "weight") or hasattr(m, "weights")]


def position_table(module: Any) -> tuple[Tensor, int]:
    """A position module's vectors [positions, H], and which of them is a row's first token's."""
    if hasattr(module, "weights"):  # fairseq's sinusoids (M2M100, NLLB): computed, counted from behind the padding's
        return module.weights, module.padding_idx + 1
    return module.weight, getattr(module, "offset", 0)


def position_room(half: nn.Module) -> int | None:
    """How many positions a model (an encoder, a decoder) has vectors for; None where they are computed.

    Tables of the parts that look at images or listen are not asked: text does not pass through them.
    """
    found: list[Any] = [
        m
        for n, m in base_modules(half)
        if n.rpartition(".")[2] in _POSITION_TABLES and isinstance(m, nn.Embedding) and not _OTHER_SENSES.search(n)
    ]
    return min((m.num_embeddings - getattr(m, "offset", 0) for m in found), default=None)


_OTHER_SENSES = re.compile(r"vision|visual|image|qformer|audio|speech", re.IGNORECASE)
_POSITION_TABLES = {"wpe", "position_embeddings", "embed_positions"}


def pools_last_token(base: nn.Module) -> bool:
    """Whether the model's head reads each row's last token (decoder-only sequence classifiers)."""
    name = type(base).__name__
    return name.endswith("ForSequenceClassification") and hasattr(base, "score")


def pools_first_token(base: nn.Module) -> bool:
    """Whether the model's head reads each row's first token (BERT and its kin)."""
    name = type(base).__name__
    return name.endswith("ForSequenceClassification") and not hasattr(base, "score") and not is_encoder_decoder(base)


def end_ids(model: Any) -> list[int]:
    """The tokens that end a text by the model's generation settings; may be more than its tokenizer's eos (Llama 3)."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [int(ends)]
