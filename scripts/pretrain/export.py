"""From a checkpoint to the files of `graftlm-base`, its evaluation and its model card.

Everything here runs on stock `transformers`: the exported directory is what is measured and sampled.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomForCausalLM, GenerationConfig

from .network import LeanBloom, config
from .sources import LEFT_OUT, SOURCES, licence
from .train import CHECKPOINT

PROMPTS = (
    "The old man looked at the sea and",
    "She opened the door and said,",
    "I do not think that",
    "The most important thing about freedom is",
    "When the war was over, the king",
    "A good friend is someone who",
    "If you want to print a document,",
    "The city was built on a hill, and",
    "My mother told me that",
    "In the morning, the children",
    "It is not easy to",
    "The captain asked for your help:",
    "There are many reasons why people",
    "He had never seen such a",
    "We are very happy to hear that",
    "The government should",
    "Why did you",
    "Yesterday I went to the market to buy",
    "The best way to learn a language is",
    "You can change the password by",
)
CHINESE_PROMPTS = ("如果您想", "我们必须", "这个选项", "他说：“", "在 Debian 系统中，")


def export(work: Path, target: Path) -> None:
    """Write config, generation config, bf16 weights and tokenizer to `target`."""
    state = torch.load(work / CHECKPOINT, weights_only=True)["optimiser"]["masters"]
    lean = LeanBloom(config())
    lean.load_state_dict(state)
    model = BloomForCausalLM(config())
    model.transformer.load_state_dict(lean.state_dict())
    model.tie_weights()
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    model.save_pretrained(target)
    tokenizer = json.loads((work / "tokenizer" / "tokenizer_config.json").read_text())
    tokenizer["model_max_length"] = 2048
    (target / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2, ensure_ascii=False) + "\n")
    (target / "tokenizer.json").write_bytes((work / "tokenizer" / "tokenizer.json").read_bytes())


@torch.no_grad()
def heldout(model: BloomForCausalLM, path: Path, length: int = 256, limit: int = 10_000) -> dict[str, float]:
    """Loss and perplexity per token of a held-out file, in windows of `length`."""
    tokens = np.fromfile(path, dtype=np.uint16).astype(np.int64)
    rows = min(limit, (len(tokens) - 1) // length)
    windows = torch.from_numpy(np.stack([tokens[r * length : r * length + length + 1] for r in range(rows)]))
    total = 0.0
    for part in windows.split(8):
        logits = model(input_ids=part[:, :-1]).logits.float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    loss = total / (rows * length)
    return {"tokens": rows * length, "loss": round(loss, 4), "perplexity": round(math.exp(loss), 2)}


def evaluate(work: Path, target: Path, limit: int = 10_000) -> dict[str, dict[str, float]]:
    """Held-out figures of the exported files by language, in fp32 and (English) in bf16; `evaluation.json` in `work`."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    found = {lang: heldout(model, work / f"heldout-{lang}.bin", limit=limit) for lang in ("en", "zh")}
    found["en-bf16"] = heldout(model.to(torch.bfloat16), work / "heldout-en.bin", limit=limit)
    (work / "evaluation.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


@torch.no_grad()
def complete(target: Path, prompts: tuple[str, ...], sample: bool, length: int = 40) -> list[str]:
    """One completion a prompt: greedy (with a repetition penalty of 1.2), or sampled at temperature 0.7, top-p 0.9."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(target)
    torch.manual_seed(0)
    how = {"do_sample": True, "temperature": 0.7, "top_p": 0.9} if sample else {"do_sample": False}
    texts = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=length, repetition_penalty=1.2, **how)[0]
        texts.append(tokenizer.decode(out, skip_special_tokens=True).replace("\n", " / "))
    return texts


def _sources_table(work: Path) -> list[str]:
    """Rows of the model card's table of packages, after the counts in `stats.json`."""
    packages = json.loads((work / "stats.json").read_text())["packages"]
    rows = [
        "| package | licence of the text | documents | English tokens | Chinese tokens | weight |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for source in SOURCES:
        if source.package in packages:
            n = packages[source.package]
            counts = f"{n['documents']:,} | {n['en']:,} | {n['zh']:,} | {source.weight}"
            rows.append(f"| `{source.package}` | {licence(source.package)} | {counts} |")
    return rows


def write_card(work: Path, target: Path) -> None:
    """`README.md` of the exported directory: sources, figures, completions, limits."""
    stats = json.loads((work / "stats.json").read_text())
    found = json.loads((work / "evaluation.json").read_text())
    log = [json.loads(line) for line in (work / "train-log.jsonl").read_text().splitlines()]
    unique = {lang: sum(package[lang] for package in stats["packages"].values()) for lang in ("en", "zh")}
    mix = stats["mix_tokens"]
    state = torch.load(work / CHECKPOINT, weights_only=True)
    steps, tokens_a_step = state["optimiser"]["step"], log[-1]["tokens"] // log[-1]["step"]
    fields = {
        "parameters": f"{sum(p.numel() for p in LeanBloom(config()).parameters()):,}",
        "size": f"{(target / 'model.safetensors').stat().st_size / 1e6:.1f}",
        "seen": f"{steps * tokens_a_step / 1e6:.1f}",
        "steps": f"{steps:,}",
        "minutes": f"{state['seconds'] / 60:.0f}",
        "unique_en": f"{unique['en'] / 1e6:.1f}",
        "unique_zh": f"{unique['zh'] / 1e6:.1f}",
        "share_zh": f"{100 * mix['zh'] / (mix['en'] + mix['zh']):.0f}",
        "heldout": "\n".join(
            f"| {name} | {row['tokens']:,} | {row['loss']} | {row['perplexity']} |" for name, row in found.items()
        ),
        "greedy": "\n".join(f"- {text}" for text in complete(target, PROMPTS, sample=False)),
        "sampled": "\n".join(f"- {text}" for text in complete(target, PROMPTS, sample=True)),
        "chinese": "\n".join(f"- {text}" for text in complete(target, CHINESE_PROMPTS, sample=True)),
        "sources": "\n".join(_sources_table(work)),
        "left_out": "\n".join(f"- {name}: {why}" for name, why in LEFT_OUT.items()),
    }
    card = (Path(__file__).parent / "card.md").read_text(encoding="utf-8")
    (target / "README.md").write_text(card.format(**fields), encoding="utf-8")
