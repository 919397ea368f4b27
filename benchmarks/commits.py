"""Two checkouts of GraftLM side by side: training steps, mixed batches, generation, wrapping and attaching, in turn.

    git worktree add ../before HEAD~20
    python benchmarks/commits.py ../before .           # ratios: the first's time over the second's; above 1 the second wins
    python benchmarks/commits.py ../before . --only "lora step" --rounds 21

Each checkout runs in a process of its own, on the same seeds; each round every process makes one run of a case in turn, so
that a machine whose speed drifts disturbs both alike. Printed are medians of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROWS, LENGTH = 8, 40
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 8, "target_modules": "all-linear"}),
    "dora": ("LoraConfig", {"r": 8, "target_modules": ["q_proj", "v_proj"], "use_dora": True}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 16}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 16}),
    "bottleneck": ("BottleneckConfig", {}),
}


def base() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=4096, num_key_value_heads=2, **shape))


def wrapped(*names: str) -> Any:
    """A base with one adapter for each name, named a0, a1, …"""
    import torch

    import graftlm

    torch.manual_seed(1)
    configs = [getattr(graftlm, METHODS[n][0])(task_type="CAUSAL_LM", **METHODS[n][1]) for n in names]
    model = graftlm.get_peft_model(base(), configs[0], adapter_name="a0")
    for i, config in enumerate(configs[1:], 1):
        model.add_adapter(f"a{i}", config)
    return model


def batch() -> dict[str, Any]:
    import torch

    ids = torch.randint(10, 4000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def step(*names: str, mixed: bool = False) -> Callable[[], None]:
    import torch

    model, inputs = wrapped(*names).train(), batch()
    if mixed:
        inputs["adapter_names"] = [f"a{i % len(names)}" for i in range(ROWS)]
    inputs["labels"] = inputs["input_ids"]
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run() -> None:
        for p in parameters:
            p.grad = None
        model(**inputs).loss.backward()

    torch.manual_seed(3)
    return run


def generation(*names: str) -> Callable[[], Any]:
    model, inputs = wrapped(*names).eval(), batch()
    if len(names) > 1:
        inputs["adapter_names"] = [f"a{i % len(names)}" for i in range(ROWS)]
    return lambda: model.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=0, eos_token_id=None)


def attaching(name: str, before: int) -> Callable[[], None]:
    """Attach one more adapter to a base that has `before`."""
    import graftlm

    model = wrapped(*[name] * before)
    kind, options = METHODS[name]
    config = getattr(graftlm, kind)

    def run() -> None:
        model.add_adapter("more", config(task_type="CAUSAL_LM", **options))
        model.delete_adapter("more")

    return run


CASES: dict[str, Callable[[], Callable[[], Any]]] = {
    **{f"{name} step": (lambda name=name: step(name)) for name in METHODS},
    "mixed lora step": lambda: step("lora", "lora", "lora", "lora", mixed=True),
    "mixed methods step": lambda: step("lora", "prompt", "prefix", "bottleneck", mixed=True),
    "lora generation": lambda: generation("lora"),
    "mixed lora generation": lambda: generation(*["lora"] * 8),
    "mixed methods generation": lambda: generation("lora", "prompt", "prefix", "bottleneck"),
    "wrapping": lambda: lambda: wrapped("lora"),
    "attaching the 2nd bottleneck": lambda: attaching("bottleneck", 1),
    "attaching the 40th bottleneck": lambda: attaching("bottleneck", 39),
}


def work() -> None:
    """A process of one checkout: a case's name in, its seconds out."""
    import torch

    torch.set_num_threads(int(os.environ.get("THREADS", "2")))
    ready: dict[str, Callable[[], Any]] = {}
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else is printed is no answer
    for line in sys.stdin:
        name = line.strip()
        if name not in ready:
            ready.clear()
            ready[name] = CASES[name]()
            for _ in range(3):
                ready[name]()
        start = time.perf_counter()
        ready[name]()
        print(time.perf_counter() - start, file=answers, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", type=Path, help="two of them")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work()
        return
    if len(args.checkouts) != 2:
        parser.error("expected two checkouts")
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--work"], text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(checkout.resolve() / "src")},
        )
        for checkout in args.checkouts
    ]  # fmt: skip

    def seconds(worker: Any, name: str) -> float:
        print(name, file=worker.stdin, flush=True)
        if not (answer := worker.stdout.readline()):
            sys.exit(f"{name}: {args.checkouts[workers.index(worker)]} failed")
        return float(answer)

    for name in args.only:
        ratios = []
        for turn in range(args.rounds):
            order = workers if turn % 2 else workers[::-1]
            found = {id(worker): seconds(worker, name) for worker in order}
            ratios.append(found[id(workers[0])] / found[id(workers[1])])
        low, high = statistics.quantiles(ratios, n=4)[::2]
        print(f"{name:32s} {statistics.median(ratios):.2f}  (quartiles {low:.2f} to {high:.2f})", flush=True)
    for worker in workers:
        worker.stdin.close()


if __name__ == "__main__":
    main()
