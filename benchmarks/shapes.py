"""Bases of other shapes, pretrained in passing (minutes), to see how learning rates go with the width.

    python benchmarks/shapes.py --minutes 4 --out build/shapes          # w128, w512 and w1024

All are Blooms with the bundled tokenizer, trained on the documentation in installed packages. `w128` (four layers) starts at
random. The others come from the bundled base: two of its layers are trained on without the rest, then every channel is
doubled or quadrupled so that the function stays the same, noise makes the copies differ, and training goes on.
"""

from __future__ import annotations

import argparse
import ast
import math
import random
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHAPES = {"w128": (128, 4), "w512": (512, 2), "w1024": (1024, 2)}  # name: width, layers
KEPT = (0, 7)  # layers of the bundled base
PACKAGES = ("transformers", "torch", "numpy", "sklearn", "accelerate", "pydantic")
NOISE = 0.3  # of a random wide matrix's entries
ROWS, LENGTH = 8, 128


def documentation() -> Iterator[str]:
    """Docstrings of installed packages (not of the standard library, which `defaults.py` fine-tunes on)."""
    for package in PACKAGES:
        for path in sorted((Path(sysconfig.get_path("purelib")) / package).rglob("*.py")):
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                    yield text


def token_stream(tokenizer: Any, megabytes: float = 6.0) -> Tensor:
    """Token ids of the documentation, shuffled, `</s>` between texts."""
    texts = sorted(set(documentation()))
    random.Random(0).shuffle(texts)
    chosen, size = [], 0
    for text in texts:
        chosen.append(text)
        size += len(text)
        if size > megabytes * 1e6:
            break
    ids = tokenizer(chosen)["input_ids"]
    return torch.tensor([i for row in ids for i in (*row, tokenizer.eos_token_id)])


def widened(model: Any, times: int) -> Any:
    """A Bloom `times` as wide that computes the same, its heads wider and not more, with noise on every matrix."""
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig.from_dict(model.config.to_dict() | {"hidden_size": model.config.hidden_size * times})
    wide, old = BloomForCausalLM(config), model.state_dict()
    new = {}
    for name, value in old.items():
        value = value.float()
        for dim in range(value.dim() - ("word_embeddings.weight" in name or "lm_head" in name)):
            value = value.repeat_interleave(times, -1 - dim)
        if value.dim() == 2 and "embed" not in name and "lm_head" not in name:
            value = value / times
        if "query_key_value" in name:  # rows [heads, 3, head_dim]: scores are divided by the root of head_dim
            value.unflatten(0, (config.n_head, 3, -1))[:, 0] /= math.sqrt(times)
        if "ln_f" in name:
            value = value / times  # the head sums over the copies
        new[name] = value
    wide.load_state_dict(new)
    return wide


def noisy(model: Any, times: int) -> Any:
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() == 2:
                value.add_(torch.randn_like(value) * value.pow(2).mean().sqrt() * math.sqrt(times) * NOISE)
    return model


def train(model: Any, ids: Tensor, minutes: float, rate: float, name: str) -> Any:
    """AdamW with warm-up and linear decay over the time."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    start, step, mean = time.process_time(), 0, 0.0
    generator = torch.Generator().manual_seed(0)
    while (spent := (time.process_time() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 30) * min(1.0, (1 - spent) / 0.7)
        places = torch.randint(0, len(ids) - LENGTH, (ROWS,), generator=generator)
        rows = torch.stack([ids[p : p + LENGTH] for p in places.tolist()])
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.item() if step == 0 else 0.95 * mean + 0.05 * loss.item()
        if step % 50 == 0:
            print(f"{name}: step {step}, {spent:.0%}, loss {mean:.2f}", flush=True)
        step += 1
    print(f"{name}: {step * ROWS * LENGTH} tokens, loss {mean:.2f}", flush=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/shapes"))
    parser.add_argument("--minutes", type=float, default=4.0, help="of one core, for each stage")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    args = parser.parse_args()
    from transformers import BloomConfig, BloomForCausalLM

    from graftlm.training import resolve_base

    torch.manual_seed(0)
    base, tokenizer = resolve_base("graftlm-base", dtype="fp32")
    ids = token_stream(tokenizer)
    print(f"{len(ids)} tokens", flush=True)
    narrow = None
    for name in args.shapes:
        width, layers = SHAPES[name]
        if (args.out / name / "model.safetensors").is_file():
            continue
        config = BloomConfig.from_dict(base.config.to_dict() | {"n_layer": layers, "hidden_size": min(width, 256)})
        model = BloomForCausalLM(config)
        if width < 256:
            model = train(model, ids, args.minutes, 3e-3, name)
        else:
            if narrow is None:
                kept = {f"transformer.h.{i}.": f"transformer.h.{old}." for i, old in enumerate(KEPT)}
                state = base.state_dict()
                for key in model.state_dict():
                    new = next((key.replace(a, b) for a, b in kept.items() if key.startswith(a)), key)
                    model.get_parameter(key).data.copy_(state[new]) if key != "lm_head.weight" else None
                narrow = train(model, ids, args.minutes, 1e-3, "two layers")
            times = width // 256
            model = train(noisy(widened(narrow, times), times), ids, args.minutes, 1e-3 / times, name)
        model.save_pretrained(args.out / name)
        tokenizer.save_pretrained(args.out / name)


if __name__ == "__main__":
    sys.exit(main())
