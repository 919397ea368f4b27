"""Training N adapters over one base together, one after the other, and one after the other with HF PEFT.

    python benchmarks/together.py                 # N = 1, 2, 4, 8 on the bundled base: some ten minutes
    python benchmarks/together.py --json out.json

Each way runs in a process of its own, in turns; time is from the first run's start to the last one's end (the base is loaded
before, data is prepared within GraftLM's time and before HF PEFT's), peak memory that of the process. The runs are LoRA,
Prompt Tuning, Prefix Tuning and P-Tuning in turn, of 80 steps of 8 rows of the tweets. Printed are ratios of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WAYS = ("together", "in turn", "peft")
STEPS, BATCH = 80, 8
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"r": 8}),
    ("prompt-tuning", {"num_virtual_tokens": 10}),
    ("prefix-tuning", {"num_virtual_tokens": 10}),
    ("p-tuning", {"num_virtual_tokens": 10}),
]


def recipes(count: int, folder: Path) -> list[Any]:
    from graftlm.training import Recipe

    training = {"max_steps": STEPS, "batch_size": BATCH, "eval_strategy": "no", "save_strategy": "no"}
    made = []
    for i in range(count):
        method, options = METHODS[i % len(METHODS)]
        values = {"method": method, "method_options": options, "data": {"source": "tweets", "max_eval_examples": 1}}
        made.append(Recipe.from_dict(values | {"training": training | {"seed": i}, "output_dir": str(folder / str(i))}))
    return made


def ours(count: int, folder: Path, together: bool) -> float:
    import torch

    from graftlm.training import resolve_base, run, train_together

    base, tokenizer = resolve_base("graftlm-base", dtype="fp32")
    warm = recipes(1, folder / "warm")[0].replace("training.max_steps=2")
    run(warm, model=base, tokenizer=tokenizer, quiet=True)
    start = time.perf_counter()
    if together:
        for outcome in train_together(recipes(count, folder), model=base, tokenizer=tokenizer, quiet=True):
            if outcome.error is not None:
                raise outcome.error
    else:
        for recipe in recipes(count, folder):
            torch.manual_seed(recipe.training.seed)
            run(recipe, model=base, tokenizer=tokenizer, quiet=True)
    return time.perf_counter() - start


def theirs(count: int, folder: Path) -> float:
    """HF PEFT under a plain Trainer, on the same prepared rows."""
    import peft
    import transformers

    from graftlm.training import resolve_base
    from graftlm.training.recipes import training_arguments
    from graftlm.training.setup import load_data_of

    kinds = {
        "lora": lambda o: peft.LoraConfig(task_type="CAUSAL_LM", **o),
        "prompt-tuning": lambda o: peft.PromptTuningConfig(task_type="CAUSAL_LM", **o),
        "prefix-tuning": lambda o: peft.PrefixTuningConfig(task_type="CAUSAL_LM", **o),
        "p-tuning": lambda o: peft.PromptEncoderConfig(task_type="CAUSAL_LM", encoder_hidden_size=256, **o),
    }
    base, tokenizer = resolve_base("graftlm-base", dtype="fp32")
    import torch

    def one(recipe: Any, options: dict[str, Any]) -> None:
        data = load_data_of(recipe, tokenizer, False)
        model = peft.get_peft_model(base, kinds[recipe.method](options))
        arguments = training_arguments(recipe, False, torch.float32)
        arguments.disable_tqdm = True
        trainer = transformers.Trainer(model, arguments, data_collator=data.collator, train_dataset=data.train_rows)
        nonlocal seconds
        start = time.perf_counter()
        trainer.train()
        model.save_pretrained(recipe.output_dir)
        seconds += time.perf_counter() - start
        if recipe.method == "lora":
            model.unload()

    seconds = 0.0
    one(recipes(1, folder / "warm")[0].replace("training.max_steps=2"), METHODS[0][1])
    seconds = 0.0
    for i, recipe in enumerate(recipes(count, folder)):
        one(recipe, METHODS[i % len(METHODS)][1])
    return seconds


def worker(way: str, count: int) -> None:
    from graftlm.training.meters import peak_memory, reset_peak_memory

    with tempfile.TemporaryDirectory() as name:
        reset_peak_memory()
        folder = Path(name)
        seconds = theirs(count, folder) if way == "peft" else ours(count, folder, way == "together")
        print(json.dumps({"seconds": seconds, "memory": peak_memory()}))


def measured(way: str, count: int) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, "--worker", way, str(count)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker[0], int(args.worker[1]))
        return
    found = []
    for count in args.counts:
        times: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(args.rounds):
            for way in WAYS:
                times[way].append(measured(way, count))
        median = {w: {k: statistics.median(t[k] for t in ts) for k in ("seconds", "memory")} for w, ts in times.items()}
        row: dict[str, float] = {"runs": count}
        for way in WAYS[1:]:
            row[f"{way}: time"] = median[way]["seconds"] / median["together"]["seconds"]
            row[f"{way}: memory"] = median[way]["memory"] / median["together"]["memory"]
        found.append(row)
        print(
            f"N={count}  one after the other / together: time {row['in turn: time']:.2f}, "
            f"memory {row['in turn: memory']:.2f}   "
            f"HF PEFT one after the other / together: time {row['peft: time']:.2f}, memory {row['peft: memory']:.2f}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
