"""Small GGUF files as llama.cpp's converter writes them: a tiny Llama and a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ Ġ", "Ġ hello"]
VOCABULARY = [*SPECIAL, *bytes_to_unicode().values(), *(m.replace(" ", "") for m in MERGES)]
SHAPE: dict[str, Any] = {
    "vocab_size": len(VOCABULARY), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
}  # fmt: skip


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True, initializer_range=0.3)).eval()


def permuted(weight: Tensor, heads: int) -> Tensor:
    """Query and key rows in GGUF's order: the two halves of each head by turns."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def tensors(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """The weights under GGUF's names."""
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    found = {"token_embd.weight": model.model.embed_tokens.weight, "output_norm.weight": model.model.norm.weight}
    for i, layer in enumerate(model.model.layers):
        for own, theirs in names.items():
            weight = layer.get_submodule(own).weight
            heads = {"attn_q": SHAPE["num_attention_heads"], "attn_k": SHAPE["num_key_value_heads"]}.get(theirs)
            found[f"blk.{i}.{theirs}.weight"] = permuted(weight, heads) if heads else weight
    return {name: weight.detach().float() for name, weight in found.items()}


def write_gguf(
    path: Path,
    *,
    seed: int = 0,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    architecture: str = "llama",
    rule: str | None = "smollm",
    without: str = "",
    strings: dict[str, str] | None = None,
    numbers: dict[str, int] | None = None,
    more: tuple[str, ...] = (),
) -> Path:
    """A file of `tiny_llama(seed)`.

    Args:
        kind: of the matrices; vectors are F32.
        rule: `tokenizer.ggml.pre`.
        without: the tensor of this name is left out.
        strings, numbers: more metadata.
        more: names of tensors that are added.
    """
    file = gguf.GGUFWriter(path, architecture)
    file.add_name("tiny")
    file.add_block_count(SHAPE["num_hidden_layers"])
    file.add_context_length(SHAPE["max_position_embeddings"])
    file.add_embedding_length(SHAPE["hidden_size"])
    file.add_feed_forward_length(SHAPE["intermediate_size"])
    file.add_head_count(SHAPE["num_attention_heads"])
    file.add_head_count_kv(SHAPE["num_key_value_heads"])
    file.add_layer_norm_rms_eps(SHAPE["rms_norm_eps"])
    file.add_rope_freq_base(10000.0)
    file.add_rope_dimension_count(SHAPE["hidden_size"] // SHAPE["num_attention_heads"])
    file.add_vocab_size(len(VOCABULARY))
    file.add_tokenizer_model("gpt2")
    if rule is not None:
        file.add_tokenizer_pre(rule)
    file.add_token_list(VOCABULARY)
    file.add_token_types([gguf.TokenType.CONTROL if t in SPECIAL else gguf.TokenType.NORMAL for t in VOCABULARY])
    file.add_token_merges(MERGES)
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_unk_token_id(0)
    file.add_pad_token_id(2)
    file.add_add_bos_token(False)
    file.add_chat_template(TEMPLATE)
    for key, text in (strings or {}).items():
        file.add_string(key, text)
    for key, number in (numbers or {}).items():
        file.add_uint32(key, number)
    for name, weight in tensors(tiny_llama(seed)).items():
        if name == without:
            continue
        own = kind if weight.dim() > 1 else gguf.GGMLQuantizationType.F32
        file.add_tensor(name, gguf.quantize(weight.numpy(), own), raw_dtype=own)
    for name in more:
        file.add_tensor(name, np.ones(8, dtype=np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path
