"""The points of benchmarks/planning.py: bases by their shapes, and the runs on them that are measured and planned."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def shapes() -> dict[str, Any]:
    """Configurations by name."""
    import transformers as t

    small = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8} | SPECIAL
    return {
        "bloom": t.BloomConfig(vocab_size=32_000, hidden_size=512, n_layer=8, n_head=8, **SPECIAL),
        "llama": t.LlamaConfig(
            vocab_size=16_384, intermediate_size=1536, num_key_value_heads=4, tie_word_embeddings=True,
            max_position_embeddings=2048, **small,
        ),
        "gpt2": t.GPT2Config(vocab_size=16_384, n_embd=512, n_layer=8, n_head=8, **SPECIAL),
        "opt": t.OPTConfig(vocab_size=16_384, ffn_dim=2048, word_embed_proj_dim=512, **small),
        "t5": t.T5Config(
            vocab_size=16_384, d_model=512, d_kv=64, d_ff=1024, num_layers=6, num_decoder_layers=6, num_heads=8,
            decoder_start_token_id=0, eos_token_id=2, pad_token_id=0,
        ),
        "llama-135m": t.LlamaConfig(
            vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=2048, **SPECIAL,
        ),
        "llama-0.4b": t.LlamaConfig(
            vocab_size=32_000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=20, num_attention_heads=16,
            num_key_value_heads=8, max_position_embeddings=2048, **SPECIAL,
        ),
        "llama-1.1b": t.LlamaConfig(
            vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
            num_key_value_heads=4, max_position_embeddings=2048, **SPECIAL,
        ),
        # of points that are held out
        "qwen2": t.Qwen2Config(
            vocab_size=24_000, hidden_size=768, intermediate_size=2304, num_hidden_layers=6, num_attention_heads=12,
            num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, **SPECIAL,
        ),
        "neox": t.GPTNeoXConfig(
            vocab_size=20_000, hidden_size=640, intermediate_size=2560, num_hidden_layers=10, num_attention_heads=10,
            max_position_embeddings=2048, **SPECIAL,
        ),
        "mistral": t.MistralConfig(
            vocab_size=28_000, hidden_size=896, intermediate_size=2688, num_hidden_layers=5, num_attention_heads=14,
            num_key_value_heads=7, max_position_embeddings=2048, sliding_window=None, **SPECIAL,
        ),
        "gemma": t.GemmaConfig(
            vocab_size=40_000, hidden_size=640, intermediate_size=3072, num_hidden_layers=7, num_attention_heads=5,
            num_key_value_heads=1, head_dim=128, max_position_embeddings=2048, **SPECIAL,
        ),
        "gpt2-0.35b": t.GPT2Config(vocab_size=50_257, n_embd=1024, n_layer=24, n_head=16, **SPECIAL),
        "opt-0.3b": t.OPTConfig(
            vocab_size=50_272, hidden_size=1024, ffn_dim=4096, num_hidden_layers=24, num_attention_heads=16,
            word_embed_proj_dim=1024, **SPECIAL,
        ),
        "bloom-0.5b": t.BloomConfig(vocab_size=250_880, hidden_size=1024, n_layer=22, n_head=16, **SPECIAL),
        "t5-0.2b": t.T5Config(
            vocab_size=32_128, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_decoder_layers=12, num_heads=12,
            decoder_start_token_id=0, eos_token_id=2, pad_token_id=0,
        ),
    }  # fmt: skip


def point(shape: str, method: str, form: str, batch: int, lengths: tuple[int, int], **rest: Any) -> dict[str, Any]:
    """What is measured: shape, method with its options, form of the base, rows a step, their lengths, and the rest."""
    name = f"{shape} {method} {form} {batch}x{lengths[0]}-{lengths[1]}" + "".join(f" {k}={v}" for k, v in rest.items())
    return {"name": name, "shape": shape, "method": method, "form": form, "batch": batch, "lengths": lengths} | rest


def points() -> Iterator[dict[str, Any]]:
    """The points that the planner was made with."""
    shapes = ("llama", "bloom", "gpt2", "opt", "t5")
    for shape in shapes:
        yield point(shape, "lora", "fp32", 4, (128, 128))
    yield point("llama", "lora", "nf4", 4, (128, 128))
    yield point("llama", "lora", "int8", 4, (128, 128))
    yield point("llama", "lora", "bf16", 2, (64, 64))
    yield point("llama", "lora", "fp32", 4, (128, 128), checkpointing=True)
    yield point("llama", "lora", "fp32", 16, (128, 128))
    yield point("llama", "lora", "fp32", 2, (64, 128), joint=4)
    for shape in shapes:
        yield point(shape, "prompt-tuning", "fp32", 4, (64, 128))
        yield point(shape, "prefix-tuning", "fp32", 8, (64, 64))
        yield point(shape, "bottleneck", "fp32", 4, (128, 128), checkpointing=shape != "llama")
    for method in ("p-tuning", "ia3", "loha", "lokr", "vera", "randlora", "fourierft", "miss", "oft", "boft", "adalora",
                   "ln-tuning", "adaption-prompt", "cartridge"):  # fmt: skip
        yield point("llama", method, "fp32", 4, (64, 64))
    for shape in shapes[1:]:
        yield point(shape, "lora", "nf4", 2, (64, 256))
        yield point(shape, "lora", "int8", 8, (32, 64))
        yield point(shape, "lora", "bf16", 2, (64, 64))
    for batch, length in ((1, 32), (1, 512), (16, 64), (2, 512)):
        yield point("llama", "lora", "fp32", batch, (length, length))
    yield point("llama", "lora", "fp32", 4, (32, 256), packing=1024)
    yield point("bloom", "lora", "fp32", 4, (32, 256), packing=512)
    yield point("bloom", "prompt-tuning", "fp32", 2, (64, 128), joint=4)
    yield point("llama", "lora", "fp32", 4, (128, 128), checkpointing=2)
    yield point("llama-135m", "lora", "fp32", 2, (64, 128))
    yield point("llama-135m", "lora", "fp32", 4, (128, 128))
    yield point("llama-0.4b", "lora", "fp32", 2, (64, 64))
    yield point("llama-0.4b", "lora", "nf4", 2, (64, 64), checkpointing=True)
    for shape in ("llama", "bloom", "t5"):
        yield point(shape, "lora", "fp32", 2, (64, 64), holdout=0.5)
    yield point("llama", "lora", "fp32", 2, (128, 128), holdout=0.5, answers=True)
    yield point("llama", "prompt-tuning", "bf16", 2, (64, 64), holdout=0.5, answers=True)
    yield point("llama-1.1b", "lora", "bf16", 1, (64, 64), checkpointing=True)


def held_out() -> Iterator[dict[str, Any]]:
    """Points of other shapes, methods and lengths, on which nothing of the planner was chosen."""
    yield point("qwen2", "lora", "fp32", 3, (96, 96))
    yield point("neox", "ia3", "fp32", 6, (160, 160))
    yield point("mistral", "lora", "bf16", 5, (48, 48))
    yield point("gemma", "prefix-tuning", "fp32", 2, (192, 192))
    yield point("qwen2", "loha", "fp32", 4, (96, 96))
    yield point("neox", "lora", "int8", 4, (96, 96))
    yield point("gemma", "lora", "nf4", 3, (112, 112))
    yield point("mistral", "p-tuning", "fp32", 12, (40, 40))
    yield point("qwen2", "lora", "fp32", 4, (32, 192), packing=768)
    yield point("neox", "lora", "fp32", 2, (48, 96), joint=3)
    yield point("qwen2", "vera", "bf16", 3, (160, 160))
    yield point("gemma", "oft", "fp32", 2, (72, 72))
    yield point("mistral", "bottleneck", "fp32", 8, (96, 96), holdout=0.5)
    yield point("mistral", "lora", "fp32", 2, (128, 128), options={"r": 64, "target_modules": "all-linear"})
    yield point("neox", "randlora", "fp32", 3, (80, 80))
    yield point("gpt2-0.35b", "lora", "bf16", 2, (80, 80))
    yield point("opt-0.3b", "lora", "fp32", 1, (192, 192), checkpointing=True)
    yield point("t5-0.2b", "lora", "fp32", 2, (96, 96))
    yield point("opt-0.3b", "prompt-tuning", "nf4", 1, (96, 96))
    yield point("bloom-0.5b", "prompt-tuning", "fp32", 1, (64, 64), checkpointing=True)
    yield point("qwen2", "bottleneck", "fp32", 5, (72, 72))
    yield point("neox", "lokr", "fp32", 4, (112, 112))
    yield point("mistral", "oft", "fp32", 3, (56, 56))
    yield point("gemma", "ia3", "bf16", 4, (80, 80))
    yield point("neox", "prefix-tuning", "fp32", 6, (48, 48))
    yield point("mistral", "lora", "int8", 3, (128, 128))
    yield point("qwen2", "lora", "nf4", 4, (64, 64))
    yield point("gemma", "lora", "fp32", 2, (224, 224), checkpointing=True)
    yield point("qwen2", "adaption-prompt", "fp32", 3, (104, 104))


def recipe(point: dict[str, Any], folder: Path, number: int = 0) -> Any:
    """The recipe of a point; `number` of several that train together."""
    from graftlm.training import Recipe

    form = point["form"]
    training: dict[str, Any] = {
        "batch_size": point["batch"], "max_steps": 2, "eval_strategy": "no", "save_strategy": "no",
        "gradient_checkpointing": point.get("checkpointing", False),
    }  # fmt: skip
    if point.get("packing"):
        training |= {"packing": True, "tokens": point["packing"]}
    return Recipe.from_dict({
        "base": str(folder / point["shape"]), "method": point["method"], "method_options": point.get("options", {}),
        "quantization": form if form in ("int8", "nf4") else None, "dtype": form if form in ("bf16", "fp32") else "fp32",
        "data": {"source": str(data(point, folder)), "holdout": point.get("holdout", 0), "max_length": point["lengths"][1]},
        "training": training, "output_dir": str(folder / f"out-{number}"), "overwrite": True,
    })  # fmt: skip


def data(point: dict[str, Any], folder: Path) -> Path:
    """Rows of words, of lengths between the point's two. Rows of different lengths are one batch, which every step takes:
    what is measured is then the longest batch, for which a plan is made; packs are chosen among 64 rows."""
    low, high = point["lengths"]
    pairs = point["shape"].startswith("t5") or point.get("answers", False)
    count = 64 if low == high or point.get("packing") else point["batch"]
    path = folder / f"rows-{low}-{high}-{pairs}-{count}.jsonl"
    if not path.is_file():
        steps = [i % 5 / 4 for i in range(count)] if count == 64 else [i / (count - 1) for i in range(count)]
        texts = [" ".join(["the"] * (low + int((high - low) * step) + (low == high))) for step in steps]
        named = [{"prompt": x, "completion": "a b c d e f g h"} for x in texts] if pairs else None
        lines = named or [{"text": x} for x in texts]
        path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return path


def build(shape: str, folder: Path) -> None:
    """A random checkpoint of a shape with the bundled tokenizer."""
    if (folder / shape).is_dir():
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    from graftlm.bundled import base_path

    torch.manual_seed(0)
    config = shapes()[shape]
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    kind.from_config(config, dtype=torch.float32).save_pretrained(folder / shape)
    AutoTokenizer.from_pretrained(base_path()).save_pretrained(folder / shape)
