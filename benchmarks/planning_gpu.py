"""Planned against real memory of training steps on a GPU: every point in a process of its own.

    python benchmarks/planning_gpu.py --json planning-gpu.json

A worker makes a base of a shape on the GPU, trains an adapter for three updates of two batches with fused AdamW, and says
what the allocator held at most and what the process took besides (CUDA's context). The last two points are of the shape of
document 003: P-Tuning on a Bloom of 1.3 billion parameters, one row of 256 tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from planning_points import point, shapes

PUBLISHED = {"num_virtual_tokens": 10}
POINTS = (
    point("llama-135m", "lora", "bf16", 4, (256, 256)),
    point("llama-0.4b", "lora", "fp32", 2, (512, 512)),
    point("bloom-1.3b", "p-tuning", "fp32", 1, (256, 256), options=PUBLISHED),
    point("bloom-1.3b", "p-tuning", "fp32", 1, (256, 256), options=PUBLISHED | {"encoder_reparameterization_type": "LSTM"}),
)


def config_of(shape: str) -> Any:
    import transformers as t

    if shape == "bloom-1.3b":
        return t.BloomConfig(vocab_size=46_145, hidden_size=2048, n_layer=24, n_head=16)
    return shapes()[shape]


def recipe(found: dict[str, Any]) -> Any:
    from graftlm.training import Recipe

    return Recipe.from_dict({
        "base": found["shape"], "method": found["method"], "method_options": found.get("options", {}),
        "dtype": found["form"], "training": {"batch_size": found["batch"], "accumulation": 2},
    })  # fmt: skip


def worker(found: dict[str, Any]) -> None:
    """Make the steps; prints the bytes as JSON."""
    import torch
    from transformers import AutoModelForCausalLM

    import graftlm
    from graftlm.training.defaults import config_type, defaults_of

    dtype = torch.bfloat16 if found["form"] == "bf16" else torch.float32
    with torch.device("cuda"):
        base = AutoModelForCausalLM.from_config(config_of(found["shape"]), dtype=dtype)
    options = {k: v for k, v in defaults_of(found["method"]).options.items() if "init" not in k} | found.get("options", {})
    model = graftlm.get_peft_model(base, config_type(found["method"])(task_type="CAUSAL_LM", **options)).train()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    ids = torch.randint(3, 1000, (found["batch"], found["lengths"][1]), device="cuda")
    for _ in range(3):
        for _ in range(2):
            model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    free, total = torch.cuda.mem_get_info()
    held = torch.cuda.max_memory_reserved()
    print(json.dumps({"held": held, "besides": total - free - torch.cuda.memory_reserved()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("planning-gpu.json"), help="where the results go")
    parser.add_argument("--worker", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(json.loads(args.worker))
        return
    from graftlm.planning import plan

    rows = []
    for found in POINTS:
        planned = plan(recipe(found), rows=8, length=found["lengths"][1], config=config_of(found["shape"]), device="h100")
        row = found | {"planned": planned.step.total, "step": planned.to_dict()["step"]}
        done = subprocess.run([sys.executable, __file__, "--worker", json.dumps(found)], capture_output=True, text=True)
        row |= {"error": done.stderr[-1500:]} if done.returncode else json.loads(done.stdout.strip().splitlines()[-1])
        rows.append(row)
        args.json.write_text(json.dumps(rows, indent=1, default=str), encoding="utf-8")
        off = f"{row['planned'] / row['held'] - 1:+.1%}" if "held" in row else "failed"
        print(f"{found['name']}: held {row.get('held', 0) >> 20:,} MiB, planned {row['planned'] >> 20:,}, {off}", flush=True)
    if any("error" in row for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
