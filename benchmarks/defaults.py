"""How far recipes' defaults end from the best that a search of settings finds: held-out loss by method, base and data.

    python benchmarks/defaults.py --base graftlm-base --data tweets20 tweets chat --json out.jsonl     # goes on where it was
    python benchmarks/defaults.py --base smollm2 --data tweets --methods lora --rates 3e-4 1e-3 --json out.jsonl
    python benchmarks/defaults.py --table --json out.jsonl

For each base, data set and method the default rate and those beside it on a grid of half powers of ten are measured, and
further ones while the best is the outermost; then, where the default is more than 5 % worse than the best, both with two
more seeds. Runs are a recipe's: held-out loss after every epoch, and the best one's weights at the end (`--set
training.load_best=false` for the last). `--rates` measures these only. Every rate of every method trains over one base,
together. Data sets: the bundled ones, and three made here of what is installed everywhere: `tweets20` (20 labelled rows),
`docs` (2,000 names of the standard library's functions with the first line of their documentation) and `chat` (200 of them
as conversations).
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import math
import pkgutil
import statistics
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

MADE = ("tweets20", "docs", "chat")
GRID = [float(f"{m}e{e}") for e in range(-6, 2) for m in (1, 3)]
SEEDS = (0, 1, 2)
GOAL = 0.05  # how much worse than the best a default may be
EVALUATED = 60  # held-out rows
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


class Key(NamedTuple):
    """One run."""

    base: str
    data: str
    set: tuple[str, ...]
    method: str
    rate: float
    seed: int


class Results:
    """Held-out losses by run, kept in a file of JSON lines."""

    def __init__(self, file: Path | None) -> None:
        self.file, self.losses = file, dict[Key, float]()
        for line in file.read_text().splitlines() if file is not None and file.is_file() else ():
            row = json.loads(line)
            key = Key(*(tuple(row[k]) if k == "set" else row[k] for k in Key._fields))
            self.losses[key] = math.inf if row.get("loss") is None else row["loss"]

    def add(self, key: Key, row: dict[str, Any]) -> None:
        self.losses[key] = row.get("loss", math.inf)
        line = json.dumps(key._asdict() | row)
        print(line, flush=True)
        if self.file is not None:
            with self.file.open("a") as file:
                file.write(line + "\n")

    def of(self, like: Key) -> dict[float, float]:
        """Loss by rate, of runs that are like this one."""
        return {k.rate: loss for k, loss in self.losses.items() if k._replace(rate=like.rate) == like}


def grid_around(rate: float, found: dict[float, float]) -> list[float]:
    """Rates to measure: the default's neighbours on the grid, and further ones while the best is the outermost."""
    wanted = {max(g for g in GRID if g < 0.7 * rate), rate, min(g for g in GRID if g > 1.4 * rate)}
    if wanted <= found.keys():
        best = min(found, key=lambda r: found[r])
        if best == min(found):
            wanted.add(max(g for g in GRID if g < best))
        if best == max(found):
            wanted.add(min(g for g in GRID if g > best))
    return sorted(wanted - found.keys())


class Bench:
    """One base with one data set."""

    def __init__(self, args: argparse.Namespace, data: str, source: str, model: Any, tokenizer: Any, folder: Path) -> None:
        from graftlm.training import Recipe, measure
        from graftlm.training.setup import load_data_of

        self.args, self.model, self.tokenizer, self.folder = args, model, tokenizer, folder
        self.results = Results(args.json)
        self.like = Key(args.base, data, tuple(args.set), "", 0.0, 0)
        self.common: dict[str, Any] = {"base": args.base, "data": {"source": source, "max_eval_examples": EVALUATED}}
        first = Recipe.from_dict(self.common, args.set)
        self.rows = load_data_of(first, tokenizer, False)
        self.baseline = measure(first, model, tokenizer, self.rows)

    def train(self, keys: list[Key]) -> None:
        """Train the runs that are not in the file yet, together."""
        from graftlm.training import Recipe, Together

        together = Together(self.model, self.tokenizer, at_once=self.args.at_once, quiet=True)
        for number, key in enumerate(k for k in dict.fromkeys(keys) if k not in self.results.losses):
            own = [f"method={key.method}", f"training.seed={key.seed}", f"training.learning_rate={key.rate!r}"]
            place = self.folder / f"{key.data}-{key.seed}-{number}"
            recipe = Recipe.from_dict(self.common, [*self.args.set, *own, f"output_dir={place}", "overwrite=true"])
            together.add(recipe, baseline=self.baseline, data=self.rows, done=Note(self.results, key))
        together.run()

    def search(self) -> None:
        """Every method's grid with the first seed, then default and best with the others."""
        methods = [self.like._replace(method=m, rate=default_rate(m, self.model)) for m in self.args.methods]
        while wanted := [m._replace(rate=r) for m in methods for r in grid_around(m.rate, self.results.of(m))]:
            self.train(wanted)
        both = []
        for m in methods:
            found = self.results.of(m)
            best = min(found, key=lambda r: found[r])
            if found[best] < (1 - GOAL) * found[m.rate]:
                both += [m._replace(rate=r, seed=s) for s in SEEDS for r in (m.rate, best)]
        self.train(both)


class Note:
    """Keeps how a run ended."""

    def __init__(self, results: Results, key: Key) -> None:
        self.results, self.key = results, key

    def __call__(self, outcome: Any) -> None:
        if outcome.error is not None:
            self.results.add(self.key, {"error": str(outcome.error)[:200]})
            return
        import yaml

        found = outcome.result
        used = yaml.safe_load((found.output_dir / "recipe.yaml").read_text())["training"]
        row: dict[str, Any] = {k: used[k] for k in ("epochs", "batch_size")}
        row |= {k: found.metrics[k] for k in ("loss_before", "loss", "accuracy", "seconds")}
        row["train"] = next((e["train_loss"] for e in reversed(found.history) if "train_loss" in e), None)
        self.results.add(self.key, row)


def default_rate(method: str, model: Any) -> float:
    from graftlm.architectures import model_dims
    from graftlm.training.defaults import defaults_of

    dims = model_dims(model)
    return defaults_of(method).rate(dims.hidden, dims.layers)


def table(results: Results, shapes: dict[str, tuple[int, int]]) -> None:
    """Held-out loss of the default and of the best rate, by base, data and method: means over the seeds that both have."""
    from graftlm.training.defaults import defaults_of

    print("| base | data | method | default | best | loss | of the best | more by |\n|---|---|---|--:|--:|--:|--:|--:|")
    for like in dict.fromkeys(k._replace(rate=0.0, seed=0) for k in results.losses):
        default = defaults_of(like.method).rate(*shapes[like.base])
        first = results.of(like)
        if default not in first:
            continue
        best = min(first, key=lambda r: (first[r], r != default))
        pairs = [
            (found[default], found[best])
            for s in SEEDS
            if {default, best} <= (found := results.of(like._replace(seed=s))).keys()
        ]
        ours, theirs = (statistics.fmean(column) for column in zip(*pairs, strict=True))
        names = f"{like.base.rpartition('/')[2]} | {' '.join((like.data, *like.set))} | {like.method}"
        print(f"| {names} | {default:g} | {best:g} | {ours:.3f} | {theirs:.3f} | {ours / theirs - 1:+.0%} ({len(pairs)}) |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="graftlm-base")
    parser.add_argument("--data", nargs="+", default=["tweets"], help=f"bundled names, paths, {', '.join(MADE)}")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--rates", nargs="+", type=float, default=None, help="these only, with --seeds; no search")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="other parts of the recipe; dtype=bf16 for the base"
    )
    parser.add_argument("--at-once", type=int, default=5)
    parser.add_argument(
        "--json", type=Path, default=None, help="a file to which every run adds a line; its runs are not repeated"
    )
    parser.add_argument("--table", action="store_true", help="print what the file holds")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.table:
        from transformers import AutoConfig

        from graftlm.bundled import resolve

        results = Results(args.json)
        configs = {b: AutoConfig.from_pretrained(resolve(b)) for b in {k.base for k in results.losses}}
        table(results, {b: (c.hidden_size, c.num_hidden_layers) for b, c in configs.items()})
        return
    from graftlm.training import Recipe, resolve_base

    first = Recipe.from_dict({"base": args.base, "dtype": "fp32"}, args.set)
    model, tokenizer = resolve_base(args.base, dtype=first.dtype)
    with tempfile.TemporaryDirectory() as name:
        for data in args.data:
            bench = Bench(args, data, made_data(data, Path(name)), model, tokenizer, Path(name) / "runs")
            if args.rates is None:
                bench.search()
            else:
                runs = [
                    bench.like._replace(method=m, rate=r, seed=s)
                    for m in args.methods
                    for r in args.rates
                    for s in args.seeds
                ]
                bench.train(runs)


if __name__ == "__main__":
    sys.exit(main())
