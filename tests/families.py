"""Tiny random models of every family, from configurations (no hub)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as t
from torch import nn

from graftlm.architectures.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration

VOCAB = 96
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **SPECIAL}
_GQA = {**_SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}
_OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 128}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, **SPECIAL}

CAUSAL: dict[str, Callable[[], tuple[type, object]]] = {
    "bloom": lambda: (t.BloomForCausalLM, t.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, **SPECIAL)),
    "opt": lambda: (t.OPTForCausalLM, t.OPTConfig(**_SIZES, **_OPT)),
    "gpt2": lambda: (t.GPT2LMHeadModel, t.GPT2Config(**_GPT2)),
    "llama": lambda: (t.LlamaForCausalLM, t.LlamaConfig(**_GQA)),
    "mistral": lambda: (t.MistralForCausalLM, t.MistralConfig(**_GQA, sliding_window=None)),
    "qwen2": lambda: (t.Qwen2ForCausalLM, t.Qwen2Config(**_GQA)),
    "qwen3": lambda: (t.Qwen3ForCausalLM, t.Qwen3Config(**_GQA, head_dim=16)),
    "gemma3": lambda: (
        t.Gemma3ForCausalLM,
        t.Gemma3TextConfig(**{**_GQA, "num_key_value_heads": 1}, head_dim=16, sliding_window=64,
                           layer_types=["sliding_attention", "full_attention"]),
    ),
    "glm": lambda: (t.GlmForCausalLM, t.GlmConfig(**_GQA, head_dim=8)),
    "glm4": lambda: (t.Glm4ForCausalLM, t.Glm4Config(**_GQA, head_dim=8)),
    "chatglm": lambda: (
        ChatGLMForConditionalGeneration,
        ChatGLMConfig(num_layers=2, padded_vocab_size=VOCAB, hidden_size=32, ffn_hidden_size=48, kv_channels=8,
                      num_attention_heads=4, multi_query_group_num=2, seq_length=128, **SPECIAL),
    ),
    "gpt_neox": lambda: (t.GPTNeoXForCausalLM, t.GPTNeoXConfig(**_SIZES, intermediate_size=48, max_position_embeddings=128)),
    "phi3": lambda: (t.Phi3ForCausalLM, t.Phi3Config(**_GQA)),
    "falcon": lambda: (t.FalconForCausalLM, t.FalconConfig(**_SIZES)),
}  # fmt: skip

SEQ2SEQ: dict[str, Callable[[], tuple[type, object]]] = {
    "t5": lambda: (
        t.T5ForConditionalGeneration,
        t.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4,
                   decoder_start_token_id=0, eos_token_id=2, pad_token_id=0),
    ),
    "bart": lambda: (
        t.BartForConditionalGeneration,
        t.BartConfig(vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                     decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=128,
                     decoder_start_token_id=2, forced_eos_token_id=None, **SPECIAL),
    ),
}  # fmt: skip

ENCODERS: dict[str, Callable[[], tuple[type, object]]] = {
    "bert": lambda: (
        t.BertForSequenceClassification,
        t.BertConfig(**{**_SIZES, "bos_token_id": None, "eos_token_id": None}, intermediate_size=48, num_labels=3),
    ),
    "roberta": lambda: (
        t.RobertaForSequenceClassification,
        t.RobertaConfig(**_SIZES, intermediate_size=48, num_labels=3, max_position_embeddings=130),
    ),
}

ALL = CAUSAL | SEQ2SEQ | ENCODERS


def build(name: str, seed: int = 0, **overrides: object) -> nn.Module:
    """A random model of a family, in eval mode, weights large enough that every part matters."""
    cls, config = ALL[name]()
    for key, value in overrides.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def task(name: str) -> str:
    """The task type of a family's model here."""
    return "SEQ_2_SEQ_LM" if name in SEQ2SEQ else "SEQ_CLS" if name in ENCODERS else "CAUSAL_LM"


def batch(name: str, rows: int = 3, length: int = 7, seed: int = 1) -> dict[str, torch.Tensor]:
    """Inputs with labels, without padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    out = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name in ENCODERS:
        return out | {"labels": torch.randint(0, 3, (rows,), generator=generator)}
    if name in SEQ2SEQ:
        return out | {"labels": torch.randint(3, VOCAB, (rows, length - 2), generator=generator)}
    return out | {"labels": ids.clone()}


def randomise(model: nn.Module, seed: int = 2) -> None:
    """Give every trainable parameter a value that shows (LoRA's B starts at zero)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
