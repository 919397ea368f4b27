"""How far recipes' defaults end from the best that a search of settings finds: held-out loss by method, base and data.

    python benchmarks/defaults.py --base smollm2 --data tweets --methods lora prefix-tuning --rates 3e-4 1e-3 3e-3
    python benchmarks/defaults.py --base graftlm-base --data docs --set training.epochs=3 --json out.jsonl

Without `--rates` the recipe's own default is measured. Every rate of every method trains over one base, together. Data sets:
the bundled ones, and three made here of what is installed everywhere: `tweets20` (20 labelled rows), `docs` (2,000 names of
the standard library's functions with the first line of their documentation) and `chat` (200 of them as conversations).
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import pkgutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

MADE = ("tweets20", "docs", "chat")
METHODS = ("lora", "prompt-tuning", "p-tuning", "prefix-tuning", "bottleneck")
# of the standard library: those that do something when they are imported, and those that document nothing
LEFT_OUT = {"antigravity", "this", "idlelib", "lib2to3", "test", "tkinter", "turtledemo"}


def documentation() -> list[tuple[str, str]]:
    """(qualified name, first line of its documentation) of functions and methods of the standard library, in one order."""
    found: dict[str, str] = {}
    for name in sorted(n for n in sys.stdlib_module_names if n[0] != "_" and n not in LEFT_OUT):
        modules = [name]
        try:
            package = importlib.import_module(name)
        except ImportError:
            continue
        if hasattr(package, "__path__"):
            modules += [f"{name}.{m.name}" for m in pkgutil.iter_modules(package.__path__) if m.name[0] not in "_t"]
        for path in modules:
            try:
                module = importlib.import_module(path)
            except Exception:  # a module of another system
                continue
            things = [(f"{path}.{k}", v) for k, v in vars(module).items() if getattr(v, "__module__", None) == path]
            things += [(f"{n}.{k}", v) for n, c in things if inspect.isclass(c) for k, v in vars(c).items() if k[0] != "_"]
            for qualified, thing in things:
                text = (inspect.getdoc(thing) or "").strip().splitlines()
                if callable(thing) and text and 20 < len(text[0]) < 120 and text[0] not in found.values():
                    found[qualified] = text[0]
    return sorted(found.items(), key=lambda pair: hash_of(pair[0]))


def hash_of(text: str) -> int:
    import zlib

    return zlib.crc32(text.encode())


def made_data(name: str, folder: Path) -> str:
    """A data set as the recipe names it; those of `MADE` are written into the folder."""
    from graftlm.data import load_data

    if name not in MADE:
        return name
    place = folder / name
    place.mkdir(exist_ok=True)
    if name == "tweets20":
        for split in ("train", "test"):
            rows = load_data("tweets", split=split)
            rows.select(range(20 if split == "train" else 60)).to_json(place / f"{split}.jsonl")
        return str(place)
    pairs = documentation()
    if name == "docs":
        rows = [{"prompt": f"What does {n} do?\n", "completion": text} for n, text in pairs]
        parts = {"train": rows[60:2060], "test": rows[:60]}
    else:
        ask = [{"role": "user"}, {"role": "assistant"}]
        rows = [
            {"messages": [ask[0] | {"content": f"What does {n} do?"}, ask[1] | {"content": text}]} for n, text in pairs[:260]
        ]
        parts = {"train": rows[60:], "test": rows[:60]}
    for split, content in parts.items():
        (place / f"{split}.jsonl").write_text("\n".join(json.dumps(r) for r in content) + "\n", encoding="utf-8")
    return str(place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="graftlm-base")
    parser.add_argument("--data", nargs="+", default=["tweets"], help=f"bundled names, paths, {', '.join(MADE)}")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--rates", nargs="+", type=float, default=[None])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other parts of the recipe")
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--json", type=Path, default=None, help="a file to which every run adds a line")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    from graftlm.training import Recipe, Together, measure, resolve_base
    from graftlm.training.setup import load_data_of

    model, tokenizer = resolve_base(args.base, dtype="fp32")
    with tempfile.TemporaryDirectory() as name:
        for data in args.data:
            source = made_data(data, Path(name))
            together = Together(model, tokenizer, at_once=args.at_once, quiet=True)
            common: dict[str, Any] = {
                "base": args.base, "data": {"source": source, "max_eval_examples": 60},
                "training": {"eval_strategy": "no", "save_strategy": "no", "load_best": False},
            }  # fmt: skip
            first = Recipe.from_dict(common, args.set)
            rows = load_data_of(first, tokenizer, False)
            baseline = measure(first, model, tokenizer, rows)
            runs = [(m, r, s) for m in args.methods for r in args.rates for s in args.seeds]
            for number, (method, rate, seed) in enumerate(runs):
                own = [f"method={method}", f"training.seed={seed}", f"output_dir={name}/{data.replace('/', '-')}-{number}"]
                recipe = Recipe.from_dict(common, [*args.set, *own, *([f"training.learning_rate={rate!r}"] if rate else [])])
                note = Note(args, data, recipe)
                together.add(recipe, baseline=baseline, data=rows, done=note)
            together.run()


class Note:
    """Prints a run's end and keeps it."""

    def __init__(self, args: Any, data: str, recipe: Any) -> None:
        self.args, self.data, self.recipe = args, data, recipe

    def __call__(self, outcome: Any) -> None:
        row: dict[str, Any] = {"base": self.args.base, "data": self.data, "method": self.recipe.method}
        row |= {"seed": self.recipe.training.seed, "set": self.args.set}
        if outcome.error is not None:
            row |= {"rate": self.recipe.training.learning_rate, "error": str(outcome.error)[:200]}
        else:
            import yaml

            found = outcome.result
            used = yaml.safe_load((found.output_dir / "recipe.yaml").read_text())["training"]
            row |= {"rate": used["learning_rate"], "epochs": used["epochs"], "batch_size": used["batch_size"]}
            row |= {k: found.metrics[k] for k in ("loss_before", "loss", "accuracy", "seconds")}
            row["train"] = next((e["train_loss"] for e in reversed(found.history) if "train_loss" in e), None)
        print(json.dumps(row), flush=True)
        if self.args.json:
            with self.args.json.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main())
