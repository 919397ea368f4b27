"""Measure the per-method learning rates that recipes default to: a grid on the bundled tweets with the bundled base.

    python recipes/learning_rates.py --epochs 10 --out table.md

Every run starts from the same seed; held-out loss and accuracy are of the last step (no choice of a best checkpoint).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from graftlm.training import Recipe, measure, resolve_base, run

GRID = {
    "lora": (1e-3, 3e-3, 1e-2, 3e-2),
    "prompt-tuning": (1e-2, 3e-2, 1e-1, 3e-1),
    "p-tuning": (1e-3, 3e-3, 1e-2),
    "prefix-tuning": (3e-3, 1e-2, 3e-2, 1e-1),
    "bottleneck": (1e-3, 3e-3, 1e-2, 3e-2),
}


def recipe_for(method: str, rate: float, epochs: float, folder: str, options: dict) -> Recipe:
    training = {"epochs": epochs, "learning_rate": rate, "eval_strategy": "no", "save_strategy": "no", "load_best": False}
    return Recipe.from_dict(
        {"method": method, "method_options": options, "training": training, "output_dir": folder, "overwrite": True}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--methods", nargs="*", default=list(GRID))
    parser.add_argument("--rates", nargs="*", type=float, default=None)
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    model, tokenizer = resolve_base("graftlm-base", dtype="fp32")
    baseline = measure(Recipe(), model, tokenizer)
    lines = ["| method | learning rate | held-out loss | accuracy | seconds |", "|---|---|---|---|---|"]
    lines.append(f"| base | | {baseline.metrics['loss']:.4f} | {baseline.metrics['accuracy']:.3f} | |")
    print(*lines, sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for method in arguments.methods:
            for rate in arguments.rates or GRID[method]:
                recipe = recipe_for(method, rate, arguments.epochs, folder, arguments.options)
                found = run(recipe, model=model, tokenizer=tokenizer, quiet=True, baseline=baseline).metrics
                measured = f"{found['loss']:.4f} | {found['accuracy']:.3f} | {found['seconds']:.0f}"
                lines.append(f"| {method} | {rate:g} | {measured} |")
                print(lines[-1], flush=True)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
