"""The engine's speed beside transformers' `generate` and HF PEFT's, on SmolLM2 or a random Llama: ratios of medians.

    python benchmarks/serving.py                      # prints a table; many minutes on two cores
    python benchmarks/serving.py --base random --rounds 3 --only base peft --json out.json
    python benchmarks/serving.py --base random --quick  # whether every line runs; its figures say nothing

All run in turns in one process. Lines from `trace` on run once, whatever `--rounds` says: each takes minutes. A line is in
the JSON as soon as it is known. Lines (`--only`):

    base      the base alone at several sizes of the batch, against `generate`
    peft      eight LoRA adapters, against HF PEFT's `adapter_names`
    mix       eight LoRA adapters, and a mix of methods, against the bare base in the same engine
    between   p95 of the time between tokens while long prompts arrive, against the median without
    shared    the first token behind a shared start of 60 tokens, against the same without it
    prefill   8 prompts of 128, against `generate`
    trace     requests of many lengths over eight adapters, against static batches of 8
    one       the same against one request after the other
    continuous  requests of many lengths on the base alone, against transformers' continuous batching
    turns     64 adapters in turn, against one
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import workloads
from mixed_batch import base as random_base

import graftlm
from graftlm.inference.engine import Engine, EngineConfig
from graftlm.inference.requests import Request, SamplingParams
from graftlm.inference.threads import apart

PROMPT, NEW = 32, 64


def load(name: str) -> Any:
    if name == "random":
        return random_base()
    from transformers import AutoModelForCausalLM

    from graftlm.bundled import base_path

    return AutoModelForCausalLM.from_pretrained(base_path(name), dtype="float32").eval()


def prompts(count: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(10, vocabulary - 10, (count, PROMPT), generator=torch.Generator().manual_seed(3))


def there(engine: Engine, work: Callable[[], Any]) -> Any:
    """What `work` gives in the engine's thread: two threads that multiply hinder each other (see `inference.threads`)."""
    done: Future = Future()
    engine._do(lambda: done.set_result(work()))
    return done.result()


def through_generate(engine: Engine, model: Any, ids: torch.Tensor, new: int, names: Any = None) -> Callable[[], Any]:
    options = {} if names is None else {"adapter_names": names}
    options |= {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new, "pad_token_id": 0}

    def run() -> list[list[int]]:
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        return made[:, ids.shape[1] :].tolist()

    return lambda: there(engine, run)


def through_engine(engine: Any, ids: torch.Tensor, new: int, names: list[str]) -> Callable[[], Any]:
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


def engine_on(shared: Any, kept: int = 0, extra: Sequence[str] = ()) -> Engine:
    """All adapters on one base, served. `extra`: names of further LoRA adapters."""
    model = with_loras(graftlm, copy.deepcopy(shared))
    common = {"task_type": "CAUSAL_LM"}
    model.add_adapter("prompt0", graftlm.PromptTuningConfig(num_virtual_tokens=8, **common))
    model.add_adapter("prompt1", graftlm.PromptTuningConfig(num_virtual_tokens=16, **common))
    model.add_adapter("prefix", graftlm.PrefixTuningConfig(num_virtual_tokens=8, **common))
    model.add_adapter("bottleneck", graftlm.BottleneckConfig(reduction_factor=16, **common))
    for name in extra:
        model.add_adapter(name, lora(graftlm))
    return Engine(model.eval(), config=EngineConfig(kept_tokens=kept)).start()


MIX = ["l0", "l1", "l2", "l3", "prompt0", "prompt1", "prefix", "bottleneck"]


class Bench:
    """The lines, one method each.

    Attributes:
        found: what they measured.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.shared = apart(lambda: load(args.base))
        self.vocabulary = self.shared.config.vocab_size
        self.engine = apart(lambda: engine_on(self.shared))
        self.found: list[dict[str, Any]] = []
        self.traced: tuple[float, float] | None = None

    def say(self, work: str, ratio: float, **figures: Any) -> None:
        self.found.append({"work": work, "ratio": ratio, **figures})
        listed = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())
        print(f"{work:44} ratio {ratio:.2f}   {listed}", flush=True)
        if self.args.json:
            self.args.json.write_text(json.dumps(self.found, indent=1), encoding="utf-8")

    def compare(self, work: str, calls: dict[str, Callable[[], Any]], tokens: int) -> None:
        """Speeds of calls that give the same tokens; the ratio is the last one's, an engine's, over the first one's."""
        list(calls.values())[-1]()  # warms up
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        made: dict[str, Any] = {}
        for _ in range(self.args.rounds):
            for name, call in calls.items():
                begun = time.perf_counter()
                made[name] = call()
                seconds[name].append(time.perf_counter() - begun)
        first, *others = made.values()
        speeds = {name: tokens / statistics.median(s) for name, s in seconds.items()}
        ratio = list(speeds.values())[-1] / next(iter(speeds.values()))
        self.say(work, ratio, **speeds, same_tokens=all(other == first for other in others))

    def stream(self, asked: list[Request], gaps: list[float] | None = None) -> list[list[float]]:
        """Seconds from now to each token of each request, all submitted together, or `gaps` seconds apart."""
        times: list[list[float]] = [[] for _ in asked]
        start = time.perf_counter()

        def read(handle: Any, into: list[float]) -> None:
            into += [time.perf_counter() - start for event in handle for _ in event.tokens]

        threads = []
        for request, into, gap in zip(asked, times, gaps or [0.0] * len(asked), strict=True):
            time.sleep(gap)
            threads.append(threading.Thread(target=read, args=(self.engine.submit(request), into)))
            threads[-1].start()
        for thread in threads:
            thread.join()
        return times

    def base(self) -> None:
        for rows in self.args.rows:
            ids, new = prompts(rows, self.vocabulary), self.args.new
            calls = {"generate": through_generate(self.engine, self.shared, ids, new)}
            calls["engine"] = through_engine(self.engine, ids, new, [""] * rows)
            self.compare(f"base, {rows} rows", calls, rows * new)

    def peft(self) -> None:
        import peft

        ids, names, new = prompts(8, self.vocabulary), [f"l{i}" for i in range(8)], self.args.new
        theirs = apart(lambda: with_loras(peft, copy.deepcopy(self.shared)))
        calls = {"HF PEFT": through_generate(self.engine, theirs, ids, new, names)}
        calls["engine"] = through_engine(self.engine, ids, new, names)
        self.compare("8 LoRA adapters", calls, 8 * new)

    def mix(self) -> None:
        ids, new = prompts(8, self.vocabulary), self.args.new
        for work, chosen in (("8 LoRA adapters / base", [f"l{i}" for i in range(8)]), ("mixed methods / base", MIX)):
            calls = {"base": through_engine(self.engine, ids, new, [""] * 8)}
            calls["adapters"] = through_engine(self.engine, ids, new, chosen)
            self.compare(work, calls, 8 * new)

    def trace(self) -> None:
        self.against("batches of 8", 8)

    def one(self) -> None:
        self.against("one after the other", 1)

    def against(self, work: str, size: int) -> None:
        """The trace, against batches of so many through `generate`."""
        asked = trace(self.args.requests, self.vocabulary)
        tokens = sum(r.params.max_new_tokens for r in asked)
        if self.traced is None:
            self.stream(asked[:8])  # warms up
            begun = time.perf_counter()
            first = self.stream(asked)
            self.traced = time.perf_counter() - begun, statistics.mean(t[0] for t in first)
        ours, ttft = self.traced
        begun, firsts = time.perf_counter(), []
        for start in range(0, len(asked), size):
            part = asked[start : start + size]
            there(self.engine, partial(batch_through_generate, self.engine.model, part))
            firsts += [time.perf_counter() - begun] * len(part)  # `generate` shows nothing before its end
        theirs = time.perf_counter() - begun
        figures = {"engine": tokens / ours, "generate": tokens / theirs}
        self.say(f"{len(asked)} requests / {work}", theirs / ours, **figures, ttft_ratio=ttft / statistics.mean(firsts))

    def between(self) -> None:
        long, short = prompt(400, self.vocabulary, 7), [request(32, 64, "", self.vocabulary, i) for i in range(8)]
        alone = statistics.median(b - a for t in self.stream(short) for a, b in itertools.pairwise(t))
        late = [
            replace(short[0], prompt=(*long[:-1], 10 + i), params=replace(short[0].params, max_new_tokens=1))
            for i in range(3)
        ]
        times = self.stream([*short, *late], [0.0] * 8 + [1.0] * 3)
        gaps = sorted(b - a for t in times[:8] for a, b in itertools.pairwise(t))
        p95 = gaps[int(0.95 * len(gaps))]
        self.say("p95 between tokens, long prompts / median", p95 / statistics.median(gaps), p95=p95, median_alone=alone)

    def shared_start(self) -> None:
        kept = apart(lambda: engine_on(self.shared, kept=8192))
        start = prompt(60, self.vocabulary, 5)

        def first(lead: tuple[int, ...], seed: int) -> float:
            asked = request(32, 1, "", self.vocabulary, seed)
            begun = time.perf_counter()
            kept.submit(replace(asked, prompt=(*lead, *asked.prompt))).result()
            return time.perf_counter() - begun

        first(start, 0)
        pairs = [(first((), 100 + i), first(start, 200 + i)) for i in range(15)]
        bare, behind = (statistics.median(side) for side in zip(*pairs, strict=True))
        self.say("first token behind a shared start / without", behind / bare, bare=bare, behind=behind)
        kept.close()

    def turns(self) -> None:
        names = [f"t{i}" for i in range(64)]
        self.engine.close()
        many = apart(lambda: engine_on(self.shared, extra=names))
        self.engine = many
        seconds: dict[str, list[float]] = {"one": [], "turns": []}
        for round_ in range(2):
            for kind, found in seconds.items():
                asked = [request(32, 24, names[i] if kind == "turns" else "t0", self.vocabulary, i) for i in range(64)]
                begun = time.perf_counter()
                self.stream(asked)
                found += [time.perf_counter() - begun] * (round_ > 0)
        one, turns = (statistics.median(s) for s in seconds.values())
        self.say("64 adapters in turn / one", one / turns, one=64 * 24 / one, turns=64 * 24 / turns)

    def prefill(self) -> None:
        ids = torch.stack([torch.tensor(prompt(128, self.vocabulary, i)) for i in range(8)])
        calls = {"generate": through_generate(self.engine, self.shared, ids, 1)}
        calls["engine"] = through_engine(self.engine, ids, 1, [""] * 8)
        self.compare("prefill 8 x 128", calls, 8 * 128)

    def continuous(self) -> None:
        """One side after the other: the threads of both together would be more than there are cores."""
        new = self.args.new // 2
        asked = [
            replace(request(len(r.prompt), new, "", self.vocabulary, i), prompt=r.prompt)
            for i, r in enumerate(trace(self.args.requests, self.vocabulary))
        ]
        self.stream(asked[:8])  # warms up
        ours = timed(lambda: self.stream(asked))
        self.engine.close()
        try:
            theirs = apart(lambda: timed(partial(continuous_batching, self.shared, asked, new)))
        except Exception as error:
            print(f"transformers' continuous batching does not run here: {error!r}", flush=True)
        else:
            speeds = [len(asked) * new / seconds for seconds in (theirs, ours)]
            self.say("base / continuous batching", speeds[1] / speeds[0], transformers=speeds[0], engine=speeds[1])
        self.engine = apart(lambda: engine_on(self.shared))


def timed(work: Callable[[], Any]) -> float:
    """The seconds that it takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def continuous_batching(model: Any, asked: list[Request], new: int) -> None:
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    attention = model.config._attn_implementation
    try:
        made = model.generate_batch([list(r.prompt) for r in asked], generation_config=config)
    finally:
        model.set_attn_implementation(attention)
    short = [len(one.generated_tokens) for one in made.values() if len(one.generated_tokens) != new]
    if short or len(made) != len(asked):
        raise RuntimeError(f"{len(made)} of {len(asked)} requests ended; of other lengths than {new}: {short}")


def prompt(length: int, vocabulary: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(10, vocabulary - 10, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def request(length: int, new: int, adapter: str, vocabulary: int, seed: int) -> Request:
    params = SamplingParams(max_new_tokens=new, ignore_end=True)
    return Request(prompt=prompt(length, vocabulary, seed), adapter=adapter, params=params)


def trace(count: int, vocabulary: int) -> list[Request]:
    """Prompts of 10 to 200 tokens, 10 to 120 new ones, the eight adapters by Zipf's law."""
    rng = random.Random(0)
    names, weights = [f"l{i}" for i in range(8)], [1 / (i + 1) for i in range(8)]
    return [
        request(rng.randint(10, 200), rng.randint(10, 120), rng.choices(names, weights)[0], vocabulary, i)
        for i in range(count)
    ]


def batch_through_generate(model: Any, asked: list[Request]) -> None:
    """A static batch, padded on the left, that ends with its longest."""
    width, new = max(len(r.prompt) for r in asked), max(r.params.max_new_tokens for r in asked)
    ids = torch.tensor([[0] * (width - len(r.prompt)) + list(r.prompt) for r in asked])
    mask = torch.tensor([[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in asked])
    options = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new, "pad_token_id": 0}
    model.generate(input_ids=ids, attention_mask=mask, adapter_names=[r.adapter for r in asked], **options)


# the last two change the engine
LINES = ["base", "peft", "mix", "between", "shared", "prefill", "trace", "one", "continuous", "turns"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2", help="smollm2, or random")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--new", type=int, default=NEW, help="tokens that each request writes")
    parser.add_argument("--requests", type=int, default=48, help="of the trace")
    parser.add_argument("--only", nargs="+", choices=LINES, default=LINES, help="lines of the table")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="one round of a few requests and tokens")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.new, args.requests, args.rows = 1, 4, 9, [1, 8]
    bench, start = Bench(args), time.perf_counter()
    for line in LINES:
        if line in args.only:
            getattr(bench, "shared_start" if line == "shared" else line)()
    bench.engine.close()
    print(f"{time.perf_counter() - start:.0f} s")
    workloads.synchronize()


if __name__ == "__main__":
    main()
