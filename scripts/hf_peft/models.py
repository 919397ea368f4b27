"""Tiny models with random weights under the names that HF PEFT's tests ask the hub for, as folders of one folder.

python models.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

INNER, HF, TRL = "peft-internal-testing/", "hf-internal-testing/", "trl-internal-testing/"
SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PLAIN: dict[str, Any] = {"vocab_size": 1000, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
POSITIONS: dict[str, Any] = {**PLAIN, "intermediate_size": 48, "max_position_embeddings": 512}
LLAMA: dict[str, Any] = {**POSITIONS, **SPECIAL, "num_key_value_heads": 2}
GPT2: dict[str, Any] = {"vocab_size": 1000, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, **SPECIAL}
BERT: dict[str, Any] = {**POSITIONS, "pad_token_id": 0}
DEBERTA: dict[str, Any] = {**BERT, "pos_att_type": ["c2p", "p2c"], "relative_attention": True}
LAYERS = ["sliding_attention", "full_attention"]
SIDES = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in
         {"layers": 2, "attention_heads": 4, "ffn_dim": 48}.items()}  # fmt: skip


def tokenizer() -> Any:
    """Byte pairs over one sentence."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, special_tokens=special,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    made.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog. This is a test prompt. hello world"] * 3, trainer
    )
    return t.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def decoders_only() -> list[tuple[Any, Any, list[str]]]:
    opt = t.OPTConfig(**PLAIN, **SPECIAL, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=512)
    neox = t.GPTNeoXConfig(**POSITIONS, **SPECIAL)
    gptj = t.GPTJConfig(**GPT2, rotary_dim=4)
    gemma = {**LLAMA, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 64, "layer_types": LAYERS}
    bloom = t.BloomConfig(vocab_size=1000, hidden_size=32, n_layer=2, n_head=4, **SPECIAL)
    opts = ["tiny-random-OPTForCausalLM", "opt-125m", "tiny-random-OPTForCausalLM-extended-vocab"]
    return [
        (t.OPTForCausalLM, opt, [INNER + name for name in opts]),
        (t.GPT2LMHeadModel, t.GPT2Config(**GPT2),
         [INNER + "tiny-random-GPT2LMHeadModel", HF + "tiny-random-gpt2", INNER + "tiny-random-gpt2", "gpt2"]),
        (t.GPTJForCausalLM, gptj, [INNER + "tiny-random-GPTJForCausalLM"]),
        (t.LlamaForCausalLM, t.LlamaConfig(**LLAMA), [who + "tiny-random-LlamaForCausalLM" for who in (INNER, HF, TRL)]),
        (t.Qwen2ForCausalLM, t.Qwen2Config(**LLAMA), [INNER + "tiny-dummy-qwen2", "Qwen/Qwen2-0.5B"]),
        (t.Qwen3ForCausalLM, t.Qwen3Config(**LLAMA, head_dim=16), [TRL + "tiny-Qwen3ForCausalLM"]),
        (t.MistralForCausalLM, t.MistralConfig(**LLAMA, sliding_window=None), [HF + "tiny-random-MistralForCausalLM"]),
        (t.Gemma3ForCausalLM, t.Gemma3TextConfig(**gemma), [HF + "tiny-random-Gemma3ForCausalLM"]),
        (t.BloomForCausalLM, bloom, [INNER + "tiny-random-BloomForCausalLM"]),
        (t.GPTNeoXForCausalLM, neox, [INNER + "tiny-random-GPTNeoXForCausalLM"]),
        (t.LlamaForSequenceClassification, t.LlamaConfig(**LLAMA), [TRL + "tiny-LlamaForSequenceClassification-3.2"]),
    ]  # fmt: skip


def experts() -> list[tuple[Any, Any, list[str]]]:
    qwen = t.Qwen3MoeConfig(**LLAMA, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, head_dim=16)
    oss = t.GptOssConfig(**LLAMA, head_dim=16, num_local_experts=4, num_experts_per_tok=2, layer_types=LAYERS)
    llama4 = t.Llama4TextConfig(**LLAMA, intermediate_size_mlp=48, head_dim=16, num_local_experts=4, attention_chunk_size=64)
    return [
        (t.Qwen3MoeForCausalLM, qwen, [TRL + "tiny-Qwen3MoeForCausalLM", HF + "tiny-qwen3-moe"]),
        (t.MixtralForCausalLM, t.MixtralConfig(**LLAMA, num_local_experts=4), [HF + "Mixtral-tiny"]),
        (t.GptOssForCausalLM, oss, [TRL + "tiny-GptOssForCausalLM"]),
        (t.Llama4ForCausalLM, llama4, [TRL + "tiny-Llama4ForCausalLM"]),
    ]


def encoders() -> list[tuple[Any, Any, list[str]]]:
    sizes = {"vocab_size": 1000, "d_model": 32}
    t5 = t.T5Config(**sizes, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, decoder_start_token_id=0,
                    eos_token_id=2, pad_token_id=0)  # fmt: skip
    bart = t.BartConfig(
        **sizes, **SIDES, **SPECIAL, max_position_embeddings=512, decoder_start_token_id=2, forced_eos_token_id=None
    )
    bert, roberta = t.BertConfig(**BERT), t.RobertaConfig(**POSITIONS, **SPECIAL)
    t5s = ["tiny-random-T5ForConditionalGeneration", "tiny-random-T5ForConditionalGeneration-calibrated", "tiny-random-t5"]
    return [
        (t.T5ForConditionalGeneration, t5,
         [*(INNER + name for name in t5s), "t5-base", "google/flan-t5-small", "google/flan-t5-base"]),
        (t.BartForConditionalGeneration, bart, [INNER + "tiny-random-BartForConditionalGeneration"]),
        (t.BertModel, bert, [INNER + "tiny-random-BertModel", HF + "tiny-random-BertModel", "bert-base-uncased"]),
        (t.BertForSequenceClassification, bert, [INNER + "tiny-random-BertForSequenceClassification"]),
        (t.RobertaModel, roberta, [INNER + "tiny-random-RobertaModel"]),
        (t.RobertaForSequenceClassification, roberta, [INNER + "tiny-random-RobertaForSequenceClassification"]),
        (t.DebertaModel, t.DebertaConfig(**DEBERTA), [INNER + "tiny-random-DebertaModel"]),
        (t.DebertaV2Model, t.DebertaV2Config(**DEBERTA), [INNER + "tiny-random-DebertaV2Model"]),
    ]  # fmt: skip


def main(folder: Path) -> None:
    words = tokenizer()
    for cls, config, names in (*decoders_only(), *experts(), *encoders()):
        torch.manual_seed(0)
        model = cls(config)
        for name in names:
            model.save_pretrained(folder / name)
            words.save_pretrained(folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
