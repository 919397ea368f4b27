"""Weights and shape of Llama, Qwen2, GPT-2 and Bloom under GGUF's names and in its layouts, as llama.cpp reads them.

| family | what is laid out anew |
|---|---|
| Llama | rows of queries and keys: the two halves of each head by turns (rotation of neighbours, not of halves) |
| GPT-2 | layers are kept [in, out] by transformers, [out, in] here |
| Bloom | rows of queries, keys and values: by kind, not by head |

What a file cannot say (other activations, scaled positions, extra biases) is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..errors import UnsupportedError

FAMILIES = {"llama": "LLAMA", "qwen2": "QWEN2", "gpt2": "GPT2", "bloom": "BLOOM"}
MEND = "graftlm merge writes it as a plain model, which llama.cpp's convert_hf_to_gguf.py may take."
# What llama.cpp takes for granted of a family: a field of its configuration, and the values that it may have.
TAKEN: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
    "qwen2": {"hidden_act": ("silu",), "use_sliding_window": (False,)},
    "gpt2": {
        "activation_function": ("gelu_new",), "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,), "tie_word_embeddings": (True,),
    },
    "bloom": {"apply_residual_connection_post_layernorm": (False,), "tie_word_embeddings": (True,)},
}  # fmt: skip


def check(config: Any) -> None:
    """UnsupportedError for a model that these files cannot describe."""
    family = config.model_type
    if family not in FAMILIES:
        raise UnsupportedError(f"GGUF files are written for {', '.join(FAMILIES)}; the base is {family}. {MEND}")
    for field, values in TAKEN[family].items():
        if (value := getattr(config, field, values[0])) not in values:
            raise UnsupportedError(f"{family} with {field}={value!r} is not written (only {values[0]!r}). {MEND}")
    if family in ("llama", "qwen2"):
        positions = config.rope_parameters
        if positions.get("rope_type", "default") != "default" or positions.get("partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedError(f"Scaled positions ({positions}) are not written. {MEND}")
        if family == "qwen2" and getattr(config, "head_dim", None) not in (None, head_size(config)):
            raise UnsupportedError(f"qwen2 with head_dim={config.head_dim} is not written. {MEND}")


def head_size(config: Any) -> int:
    return int(config.hidden_size // config.num_attention_heads)


def numbers(config: Any, file: Any) -> None:
    """A model's shape into a `gguf.GGUFWriter`."""
    family = config.model_type
    file.add_vocab_size(config.vocab_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_embedding_length(config.hidden_size)
    file.add_head_count(config.num_attention_heads)
    if family in ("gpt2", "bloom"):
        file.add_feed_forward_length(getattr(config, "n_inner", None) or 4 * config.hidden_size)
        file.add_layer_norm_eps(config.layer_norm_epsilon)
        # Bloom's positions have no end; llama.cpp wants a number, and 2048 is what the family was trained on
        file.add_context_length(config.n_positions if family == "gpt2" else getattr(config, "seq_length", 2048))
        return
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_context_length(config.max_position_embeddings)
    file.add_rope_freq_base(config.rope_parameters["rope_theta"])
    size = getattr(config, "head_dim", None) or head_size(config)
    file.add_rope_dimension_count(size)
    if size != head_size(config):
        file.add_key_length(size)
        file.add_value_length(size)


def tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """GGUF's name and layout of each weight. A head that is tied to the embeddings is left out: readers tie it again."""
    import gguf

    config = model.config
    architecture = gguf.MODEL_ARCH[FAMILIES[config.model_type]]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for key, value in model.state_dict().items():
        if tied and key == "lm_head.weight":
            continue
        spellings = (key, key.removeprefix("transformer."))  # the map has some of Bloom's without it
        name = next((n for k in spellings if (n := names.get_name(k, try_suffixes=(".weight", ".bias")))), None)
        if name is None:
            raise UnsupportedError(f"GGUF has no name for {key} of {config.model_type}. {MEND}")
        yield name, laid_out(config, key, value.detach())


def laid_out(config: Any, key: str, value: Tensor) -> Tensor:
    """A weight in GGUF's order of rows and axes."""
    family = config.model_type
    if family == "llama" and key.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
        return value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
    if family == "gpt2" and key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return value.T
    if family == "bloom" and "query_key_value" in key:
        return value.reshape(config.n_head, 3, -1, *value.shape[1:]).swapaxes(0, 1).reshape(value.shape)
    return value
