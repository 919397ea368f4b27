"""The engine's speed beside transformers' `generate` and HF PEFT's, on SmolLM2 or a random Llama: ratios of medians.

    python benchmarks/serving.py                      # prints a table; some minutes on two cores
    python benchmarks/serving.py --base random --rounds 3 --json out.json

All run in turns in one process: the base alone at several sizes of the batch against `generate`, eight LoRA adapters against
HF PEFT's `adapter_names`, and a mix of methods against the bare base in the same engine.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import workloads
from mixed_batch import alternate
from mixed_batch import base as random_base

PROMPT, NEW = 32, 64


def load(name: str) -> Any:
    if name == "random":
        return random_base()
    from transformers import AutoModelForCausalLM

    from graftlm.bundled import base_path

    return AutoModelForCausalLM.from_pretrained(base_path(name), dtype="float32").eval()


def prompts(count: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(10, vocabulary - 10, (count, PROMPT), generator=torch.Generator().manual_seed(3))


def through_generate(model: Any, ids: torch.Tensor, new: int, names: Any = None) -> Callable[[], Any]:
    options = {} if names is None else {"adapter_names": names}
    options |= {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new, "pad_token_id": 0}

    def run() -> list[list[int]]:
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        return made[:, PROMPT:].tolist()

    return run


def through_engine(engine: Any, ids: torch.Tensor, new: int, names: list[str]) -> Callable[[], Any]:
    from graftlm.inference.requests import Request, SamplingParams

    params = SamplingParams(max_new_tokens=new, ignore_end=True)

    def run() -> list[list[int]]:
        asked = [Request(prompt=tuple(r), adapter=n, params=params) for r, n in zip(ids.tolist(), names, strict=True)]
        handles = [engine.submit(request) for request in asked]
        return [list(handle.result().completions[0].tokens) for handle in handles]

    return run


def lora(library: Any) -> Any:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return library.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=targets, init_lora_weights=False)


def with_loras(library: Any, model: Any) -> Any:
    """Eight adapters, the same under both libraries."""
    wrapped = library.get_peft_model(model, lora(library), "l0")
    for i in range(1, 8):
        wrapped.add_adapter(f"l{i}", lora(library))
    generator = torch.Generator().manual_seed(1)
    named = {n: p for n, p in wrapped.named_parameters() if ".lora_" in n}
    with torch.no_grad():
        for name in sorted(named):
            named[name].copy_(torch.randn(named[name].shape, generator=generator) * 0.02)
    return wrapped.eval()


def engine_on(shared: Any) -> Any:
    import graftlm
    from graftlm.inference.engine import Engine, EngineConfig

    model = with_loras(graftlm, copy.deepcopy(shared))
    common = {"task_type": "CAUSAL_LM"}
    model.add_adapter("prompt0", graftlm.PromptTuningConfig(num_virtual_tokens=8, **common))
    model.add_adapter("prompt1", graftlm.PromptTuningConfig(num_virtual_tokens=16, **common))
    model.add_adapter("prefix", graftlm.PrefixTuningConfig(num_virtual_tokens=8, **common))
    model.add_adapter("bottleneck", graftlm.BottleneckConfig(reduction_factor=16, **common))
    return Engine(model, config=EngineConfig(kept_tokens=0)).start()


MIX = ["l0", "l1", "l2", "l3", "prompt0", "prompt1", "prefix", "bottleneck"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2", help="smollm2, or random")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--new", type=int, default=NEW, help="tokens that each request writes")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    shared, new = load(args.base), args.new
    vocabulary = shared.config.vocab_size
    engine, found = engine_on(shared), []

    def compare(work: str, calls: dict[str, Callable[[], Any]], rows: int) -> None:
        first, *others = [call() for call in calls.values()]
        same = all(other == first for other in others)
        seconds = dict(zip(calls, alternate(list(calls.values()), args.rounds), strict=True))
        speeds = {name: rows * new / s for name, s in seconds.items()}
        ratio = speeds["engine"] / next(iter(speeds.values()))
        found.append({"work": work, "tokens_per_second": speeds, "ratio": ratio, "same_tokens": same})
        listed = ", ".join(f"{name} {speed:.0f}" for name, speed in speeds.items())
        print(f"{work:34} {listed} tokens/s  ratio {ratio:.2f}  {'the same tokens' if same else 'other tokens'}", flush=True)

    start = time.perf_counter()
    for rows in args.rows:
        ids = prompts(rows, vocabulary)
        calls = {"generate": through_generate(shared, ids, new), "engine": through_engine(engine, ids, new, [""] * rows)}
        compare(f"base, {rows} rows", calls, rows)
    import peft

    ids, names = prompts(8, vocabulary), [f"l{i}" for i in range(8)]
    theirs = with_loras(peft, copy.deepcopy(shared))
    calls = {"HF PEFT": through_generate(theirs, ids, new, names), "engine": through_engine(engine, ids, new, names)}
    compare("8 LoRA adapters", calls, 8)
    for work, chosen in (("8 LoRA adapters", names), ("four LoRA, two prompt, prefix, bottleneck", MIX)):
        calls = {"base rows": through_engine(engine, ids, new, [""] * 8), "engine": through_engine(engine, ids, new, chosen)}
        compare(f"{work} / base", calls, 8)
    engine.close()
    print(f"{time.perf_counter() - start:.0f} s")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    workloads.synchronize()


if __name__ == "__main__":
    main()
