"""A batch of rows of different adapters: GraftLM's time beside HF PEFT's, and what prompt and prefix rows cost.

    python benchmarks/mixed_batch.py                # prints a table; about three minutes
    python benchmarks/mixed_batch.py --json out.json

Both libraries hold the same LoRA adapters over the same base in one process and run the same batch in turns; the numbers are
ratios of medians. HF PEFT mixes LoRA only, so rows of other methods are compared with plain rows that have as many keys and
tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import workloads

ROWS = 16
PROMPT = {"short": 16, "long": 96}
NEW = 24
VIRTUAL = 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def base() -> Any:
    """A Llama of 124 million parameters, random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    return (
        LlamaForCausalLM(LlamaConfig(vocab_size=32000, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes))
        .eval()
        .to(workloads.device)
    )


def config(library: Any) -> Any:
    return library.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=TARGETS, init_lora_weights=False)


def with_adapters(library: Any, model: Any, count: int) -> Any:
    """The base with `count` LoRA adapters, the same under both libraries."""
    wrapped = library.get_peft_model(model, config(library), "a0")
    for i in range(1, count):
        wrapped.add_adapter(f"a{i}", config(library))
    generator = torch.Generator().manual_seed(1)
    named = {n: p for n, p in wrapped.named_parameters() if ".lora_" in n}
    with torch.no_grad():
        for name in sorted(named):
            named[name].copy_(torch.randn(named[name].shape, generator=generator) * 0.02)
    return wrapped.eval()


def rows(length: int, count: int = ROWS) -> dict[str, Any]:
    ids = torch.randint(3, 32000, (count, length), generator=torch.Generator().manual_seed(2)).to(workloads.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def prefill(model: Any, inputs: dict[str, Any], names: Any) -> Callable[[], Any]:
    options = {} if names is None else {"adapter_names": names}

    def run() -> Any:
        with torch.no_grad():
            return model(**inputs, use_cache=True, logits_to_keep=1, **options).logits

    return run


def decode(model: Any, inputs: dict[str, Any], names: Any) -> Callable[[], Any]:
    """`NEW` tokens; the prompt is one token long, so that it is decoding that is timed."""
    options = {} if names is None else {"adapter_names": names}

    def run() -> Any:
        made = model.generate(**inputs, do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW, **options)
        return made

    return run


def alternate(calls: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Median seconds of calls that run in turns."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(2):
        for call in calls:
            call()
    for _ in range(rounds):
        for found, call in zip(times, calls, strict=True):
            workloads.synchronize()
            start = time.perf_counter()
            call()
            workloads.synchronize()
            found.append(time.perf_counter() - start)
    return [statistics.median(t) for t in times]


def ragged(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same rows, every other one `VIRTUAL` tokens shorter, padded on the left."""
    mask = inputs["attention_mask"].clone()
    mask[1::2, :VIRTUAL] = 0
    return inputs | {"attention_mask": mask}


def against_peft(rounds: int) -> list[dict[str, Any]]:
    import peft

    import graftlm

    found = []
    for count in (1, 8, 16):
        shared = base()
        ours = with_adapters(graftlm, copy.deepcopy(shared), count)
        theirs = with_adapters(peft, shared, count)
        order = [f"a{i % count}" for i in range(ROWS)]
        if count == 1:
            order[0] = "__base__"  # else it is no mixed batch
        for title, make, inputs in (
            ("prefill, 16 tokens a row", prefill, rows(PROMPT["short"])),
            ("prefill, 96 tokens a row", prefill, rows(PROMPT["long"])),
            ("decode", decode, rows(1)),
        ):
            for arrangement, names in (("as they come", order), ("sorted", sorted(order))):
                calls = [make(m, inputs, names) for m in (theirs, ours)]
                apart = (calls[0]().float() - calls[1]().float()).abs().max()
                seconds = alternate(calls, rounds)
                row = {"adapters": count, "work": title, "rows": arrangement}
                found.append(row | {"ratio": seconds[0] / seconds[1], "apart": float(apart)})
                ratio = f"HF PEFT / GraftLM {found[-1]['ratio']:.2f}"
                print(f"K={count:2}  {title:26} {arrangement:13} {ratio}  apart {float(apart):.1e}", flush=True)
    return found


def soft_rows(rounds: int) -> list[dict[str, Any]]:
    """Half of the rows under another method, beside plain rows with as many tokens and keys."""
    import graftlm

    shared = base()
    model = with_adapters(graftlm, shared, 1)
    model.add_adapter("prompt", graftlm.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL))
    model.add_adapter("prefix", graftlm.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL))
    plain = with_adapters(graftlm, base(), 1)
    length, found = PROMPT["long"], []
    for name in ("prompt", "prefix"):
        mixed = prefill(model, rows(length), [name, "__base__"] * (ROWS // 2))
        given = rows(length + VIRTUAL) if name == "prompt" else rows(length)
        if name == "prompt":
            longer = prefill(plain, given, "__base__")
        else:
            from transformers import DynamicCache

            memory = [(k, v) for k, v in model.memory(("prefix",))]

            def longer(given: Any = given, memory: Any = memory) -> Any:
                cache = DynamicCache(config=plain.config)
                for i, (k, v) in enumerate(memory):
                    cache.update(k.expand(ROWS, -1, -1, -1), v.expand(ROWS, -1, -1, -1), i)
                mask = torch.ones(ROWS, length + VIRTUAL, dtype=torch.long, device=workloads.device)
                with torch.no_grad():
                    return plain(
                        input_ids=given["input_ids"],
                        attention_mask=mask,
                        past_key_values=cache,
                        logits_to_keep=1,
                        adapter_names="__base__",
                    )

        calls = {"without padding": longer}
        if name == "prompt":  # rows of as many tokens each as this one's, so padded as well
            calls["padded"] = prefill(plain, ragged(given), "__base__")
        *others, own = alternate([*calls.values(), mixed], rounds)
        for title, seconds in zip(calls, others, strict=True):
            found.append({"work": f"{name} rows", "beside": title, "ratio": seconds / own})
            print(f"{name} rows among plain ones: a plain batch {title}, as many tokens and keys / this {seconds / own:.2f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    workloads.device = args.device
    found = against_peft(args.rounds) + soft_rows(args.rounds)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
