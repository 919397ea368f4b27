"""Training steps of GraftLM and HF PEFT on the documents' shapes, side by side.

    python benchmarks/training.py                              # all workloads, fp32 and bf16: about half an hour on two
    cores python benchmarks/training.py prefix lora --dtype bfloat16 --rounds 7 --json out.json --plot out.png
    python benchmarks/training.py --sweep                      # families x methods x dtypes, small
    python benchmarks/training.py --overheads                  # wrapping, first step, saving, switching, Trainer

Both libraries run in one process on one set of base weights (two models that share them), with the same adapter values and
the same batch, one step of each in turn; what is printed are ratios of medians. First, without dropout, loss and adapter
gradients are compared. Optimisers: AdamW as the documents make it for HF PEFT (001 and 002: torch's default; 003 and 004:
the
Trainer's fused one), fused for GraftLM; `same optimiser` is the ratio with the fused one on both sides. The share of the
floor is the useful arithmetic (real tokens, labelled logits, gradients of activations and adapters) over the fastest matrix
product measured in the same run. Peak memory: each library in a process of its own, highest resident memory with the
weights.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import memory as memory_bench

GOALS = {  # of the project: time ratio fp32, bf16; share of HF PEFT's peak fp32, bf16
    "prefix": (3.8, 4.5, 0.72, 0.72), "prompt": (1.8, 3.2, 0.43, 0.32), "ptuning": (1.2, 1.45, 0.95, 0.95),
    "ptuning-lstm": (1.2, 1.45, 0.95, 0.95), "accumulation": (1.4, 2.0, 1.3, 1.3), "lora": (1.4, 1.6, 0.87, 0.87),
    "qlora": (1.3, 1.8, 0.60, 0.60),
}  # fmt: skip


# -- workloads -----------------------------------------------------------------------------------------------------------
@dataclass
class Workload:
    """What a document trains.

    Args:
        base: makes the base model (random weights) in a dtype.
        settings: the adapter's configuration class and fields.
        lengths, labelled: tokens of each row, and how many of them, at its end, have labels (0: all).
        left: padded on the left. pad_to: to this length.
        accumulate: HF PEFT takes the rows one by one.
        plain_adamw: the document's loop makes torch's default AdamW.
    """

    base: Callable[[Any], Any]
    settings: tuple[str, dict]
    lengths: list[int]
    labelled: int = 0
    left: bool = False
    pad_to: int = 0
    accumulate: bool = False
    plain_adamw: bool = False
    quantized: str | None = None
    targets: dict = field(default_factory=dict)


def bloom(hidden: int, layers: int, vocabulary: int) -> Callable[[Any], Any]:
    def make(dtype: Any) -> Any:
        from transformers import BloomConfig, BloomForCausalLM

        config = BloomConfig(vocab_size=vocabulary, hidden_size=hidden, n_layer=layers, n_head=16)
        return in_dtype(dtype, lambda: BloomForCausalLM(config))

    return make


def opt(dtype: Any) -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=50272, hidden_size=2048, num_hidden_layers=24, ffn_dim=8192, num_attention_heads=32,
        word_embed_proj_dim=2048,
    )  # fmt: skip
    return in_dtype(dtype, lambda: OPTForCausalLM(config))


def glm(dtype: Any) -> Any:
    from transformers import GlmForCausalLM

    return in_dtype(dtype, lambda: GlmForCausalLM(memory_bench.config("glm-1b")))


def in_dtype(dtype: Any, make: Callable[[], Any]) -> Any:
    """A model with random weights: a million normal numbers over and over, for drawing a billion takes a minute."""
    import torch

    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = make()
    finally:
        torch.set_default_dtype(torch.float32)
    buffers = dict(fresh_buffers(model))
    model.to_empty(device="cpu")
    numbers = (torch.randn(2**20 + 1, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.data.fill_(0)
            continue
        flat = parameter.data.view(-1)
        for start in range(0, len(flat), len(numbers)):
            part = flat[start : start + len(numbers)]
            part.copy_(numbers[: len(part)])
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            module.weight.data.fill_(1)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    model.tie_weights()
    return model


def fresh_buffers(model: Any) -> Iterator[tuple[str, Any]]:
    """Buffers (rotary frequencies) of a model on the meta device, made anew from its configuration."""
    for path, module in model.named_modules():
        names = [n for n, _ in module.named_buffers(recurse=False)]
        fresh = type(module)(config=model.config) if names else None
        yield from ((f"{path}.{n}", getattr(fresh, n)) for n in names)


def uniform(low: int, high: int, rows: int, seed: int) -> list[int]:
    return [random.Random(seed * 1000 + i).randint(low, high) for i in range(rows)]


P_TUNING = {"num_virtual_tokens": 10}
LORA = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"]}
QLORA = {"r": 4, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": ["q_proj", "k_proj", "v_proj"]}
WORKLOADS = {
    "prefix": Workload(
        bloom(1024, 24, 250880), ("PrefixTuningConfig", {"num_virtual_tokens": 30, "prefix_projection": True}),
        uniform(20, 60, 8, 1), labelled=3, left=True, pad_to=64, plain_adamw=True,
    ),
    "prompt": Workload(
        bloom(1024, 24, 250880), ("PromptTuningConfig", {"num_virtual_tokens": 4}), uniform(60, 180, 8, 2), plain_adamw=True
    ),
    "ptuning": Workload(bloom(2048, 24, 46145), ("PromptEncoderConfig", P_TUNING), [200], labelled=120),
    "ptuning-lstm": Workload(
        bloom(2048, 24, 46145),
        ("PromptEncoderConfig", {**P_TUNING, "encoder_reparameterization_type": "LSTM", "encoder_dropout": 0.1}),
        [200], labelled=120,
    ),
    "accumulation": Workload(
        bloom(2048, 24, 46145), ("PromptEncoderConfig", P_TUNING), uniform(100, 200, 8, 3), labelled=60, accumulate=True
    ),
    "lora": Workload(opt, ("LoraConfig", LORA), uniform(20, 60, 4, 4)),
    "qlora": Workload(glm, ("LoraConfig", QLORA), uniform(60, 200, 6, 5), quantized="nf4"),
}  # fmt: skip


def batch(work: Workload, vocabulary: int) -> dict[str, Any]:
    """A padded batch: input_ids, attention_mask, labels [rows, longest]."""
    import torch

    torch.manual_seed(1)
    width = work.pad_to or max(work.lengths)
    ids = torch.full((len(work.lengths), width), 3)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, length in enumerate(work.lengths):
        end = width if work.left else length
        ids[i, end - length : end] = torch.randint(10, vocabulary, (length,))
        mask[i, end - length : end] = 1
        count = work.labelled or length
        labels[i, end - count : end] = ids[i, end - count : end]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def load(work: Workload, dtype: Any, folder: str | None) -> Any:
    """The base: made, or, quantised, loaded from a checkpoint in `folder`."""
    import torch

    torch.manual_seed(0)
    if work.quantized is None:
        return work.base(dtype)
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=settings, device_map="cpu")


def wrap(library: Any, base: Any, work: Workload) -> Any:
    kind, settings = work.settings
    if work.quantized:
        base = library.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    task = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    return library.get_peft_model(base, getattr(library, kind)(task_type=task, **settings)).train()


def sharing(base: Any) -> Any:
    """A second model over the same weights."""
    return copy.deepcopy(base, {id(t): t for t in [*base.parameters(), *base.buffers()]})


# -- one library on one workload ---------------------------------------------------------------------------------------
class Runner:
    """Steps of one library."""

    def __init__(self, library: str, model: Any, inputs: dict[str, Any], one_by_one: bool) -> None:
        import torch

        self.library, self.model = library, model
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.parts = [inputs]
        if one_by_one or "num_items_in_batch" in inputs:
            self.parts = [dict(inputs)]
        if one_by_one:
            items = inputs["num_items_in_batch"]
            rows = len(inputs["labels"])
            self.parts = [self.alone(inputs, i) | {"num_items_in_batch": items} for i in range(rows)]
            if library == "graftlm":  # as GraftLM's Trainer takes them
                self.parts = joined(self.parts)
        self.adamw = {f: torch.optim.AdamW(self.trained, lr=1e-4, fused=f or None) for f in (False, True)}

    @staticmethod
    def alone(inputs: dict[str, Any], row: int) -> dict[str, Any]:
        """One row without its padding."""
        kept = inputs["attention_mask"][row].bool()
        return {k: v[row : row + 1, kept] for k, v in inputs.items() if k != "num_items_in_batch"}

    def backward(self) -> float:
        total = 0.0
        for part in self.parts:
            loss = self.model(**part).loss
            loss.backward()
            total += loss.item()
        return total

    def gradients(self) -> tuple[float, Any]:
        """Loss and all gradients in one row."""
        import torch

        self.model.zero_grad()
        loss = self.backward()
        found = torch.cat([p.grad.double().flatten() for p in self.trained])
        self.model.zero_grad()
        return loss, found

    def step(self, *optimisers: bool) -> list[float]:
        """Seconds of forward and backward, and of each optimiser (fused or not) with these gradients; the fused one's."""
        start = time.perf_counter()
        self.backward()
        found = [time.perf_counter() - start]
        for fused in optimisers or (True,):
            start = time.perf_counter()
            self.adamw[fused].step()
            found.append(time.perf_counter() - start)
        self.model.zero_grad()
        return found


def joined(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The batches of one update as GraftLM's Trainer joins them."""
    from graftlm.training.joining import Joiner

    joiner, items, made = Joiner(), parts[0]["num_items_in_batch"], []
    for i, part in enumerate(parts):
        batch = {k: v for k, v in part.items() if k != "num_items_in_batch"}
        made += joiner.add(batch, last=i == len(parts) - 1)
    return [m | {"num_items_in_batch": items} for m in made]


class Incomparable(Exception):
    """HF PEFT makes an adapter that does not fit the model (Falcon's one key-value head under a prefix)."""


def pair(work: Workload, dtype: Any, folder: str | None) -> tuple[Runner, Runner]:
    """HF PEFT and GraftLM over one set of weights, with the same adapter values."""
    import peft

    import graftlm

    base = load(work, dtype, folder)
    other = load(work, dtype, folder) if work.quantized else sharing(base)
    vocabulary = base.config.vocab_size
    theirs, ours = wrap(peft, base, work), wrap(graftlm, other, work)
    values = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            value = values.pop(name).data
            if value.shape != parameter.shape:
                shapes = tuple(value.shape), tuple(parameter.shape)
                raise Incomparable(f"HF PEFT's {name} is {shapes[0]} where the model needs {shapes[1]}")
            parameter.data.copy_(value)
            if "lora_B" in name:
                parameter.data.normal_(0, 0.02)
    assert not values, f"HF PEFT trains more: {sorted(values)}"
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(dict(ours.named_parameters())[name].data)
    inputs = batch(work, vocabulary)
    if work.accumulate:
        inputs["num_items_in_batch"] = (inputs["labels"][:, 1:] != -100).sum()
    return Runner("peft", theirs, inputs, work.accumulate), Runner("graftlm", ours, inputs, work.accumulate)


def without_dropout(model: Any) -> Callable[[], None]:
    """Switch all dropout off; returns what puts it back."""
    import torch

    undo = []
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if (
                isinstance(value, float)
                and value
                and (name == "dropout" or (name == "p" and isinstance(module, torch.nn.Dropout)))
            ):
                undo.append((module, name, value))
                setattr(module, name, 0.0)
    return lambda: [setattr(*u) for u in undo] and None


def compare(theirs: Runner, ours: Runner) -> dict[str, float]:
    """Relative differences of loss and gradients, dropout off; and of HF PEFT's gradients with one more place of padding.

    The last is what rounding alone does: where an activation has a kink (OPT's ReLU), an input that is rounded to the other
    side of it switches a whole gradient on or off.
    """
    undo = [without_dropout(r.model) for r in (theirs, ours)]
    (loss, gradient), (own_loss, own_gradient) = theirs.gradients(), ours.gradients()
    parts, theirs.parts = theirs.parts, [wider(part) for part in theirs.parts]
    again = theirs.gradients()[1]
    theirs.parts = parts
    for put_back in undo:
        put_back()
    length = gradient.norm()
    return {
        "loss": abs(own_loss - loss) / abs(loss),
        "gradient": float((own_gradient - gradient).norm() / length),
        "rounding": float((again - gradient).norm() / length),
    }


def wider(part: dict[str, Any]) -> dict[str, Any]:
    """The same rows with one more place of padding, on the right."""
    import torch.nn.functional as F

    filler = {"input_ids": 3, "attention_mask": 0, "labels": -100}
    return {k: F.pad(v, (0, 1), value=filler[k]) if k in filler else v for k, v in part.items()}


def alternate(theirs: Runner, ours: Runner, work: Workload, rounds: int) -> dict[str, list[float]]:
    """Seconds of each part, one step of each library in turn after one to warm up."""
    times: dict[str, list[float]] = {k: [] for k in ("peft", "peft adamw", "peft fused", "graftlm", "graftlm fused")}
    for round_ in range(rounds + 1):
        allocator(kept=False)
        theirs.backward()  # not timed: the allocator settles
        passes, *optimisers = theirs.step(not work.plain_adamw, True)
        allocator(kept=True)
        ours.backward()
        own = ours.step()
        if round_:
            for key, seconds in zip(times, (passes, *optimisers, *own), strict=True):
                times[key].append(seconds)
    return times


def allocator(kept: bool) -> None:
    """glibc's thresholds as GraftLM sets them, or as a process has them: each library is measured under its own."""
    import ctypes

    try:
        library = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    for option, values in ((-3, (2**30, 2**25)), (-1, (2**31 - 1, 2**26)), (-2, (2**26, 2**17))):
        library.mallopt(option, values[not kept])
    if not kept:
        library.malloc_trim(0)


# -- floor ---------------------------------------------------------------------------------------------------------------
def peak_flops(dtype: Any) -> float:
    """The fastest matrix product of this machine, by torch's default or oneDNN, in FLOP/s."""
    import torch
    import torch.nn.functional as F

    best = 0.0
    for rows, width in ((1024, 2048), (2048, 4096)):
        x, weight = torch.randn(rows, width).to(dtype), torch.randn(width, width).to(dtype)
        calls = [lambda: F.linear(x, weight)]  # noqa: B023
        if torch.backends.mkldnn.is_available():
            calls.append(lambda: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""))  # noqa: B023
        for call in calls:
            call()
            for _ in range(5):
                start = time.perf_counter()
                call()
                best = max(best, 2 * rows * width * width / (time.perf_counter() - start))
    return best


def useful_flops(work: Workload, model: Any) -> float:
    """Arithmetic that a step cannot do without: 2 a weight and token forward, 2 for the gradient of the activations, 2 more
    for that of a trained weight; attention over real tokens only."""
    base = model.get_base_model()
    head = base.get_output_embeddings()
    config = base.config
    virtual = work.settings[1].get("num_virtual_tokens", 0)
    prefix = virtual if work.settings[0] == "PrefixTuningConfig" else 0
    tokens = sum(work.lengths) + (virtual - prefix)  # virtual tokens once
    labelled = sum(work.labelled or length - (virtual == 0) for length in work.lengths)
    total = 4.0 * head.weight.shape[0] * head.weight.shape[1] * labelled
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dim() == 2 and "embedding" not in name:
            total += 6.0 * parameter.numel() * (tokens if "lora_" in name else virtual)
    for name, module in base.named_modules():
        weight = getattr(module, "weight", None)
        linear = hasattr(module, "in_features") and not name.split(".")[-1].startswith("default") and module is not head
        if linear and weight is not None and not weight.requires_grad and not hasattr(module, "base_layer"):
            total += 4.0 * module.in_features * module.out_features * tokens
    layers, width = config.num_hidden_layers, config.hidden_size
    seen = sum(length * (length / 2 + virtual) for length in work.lengths)
    return total + 3 * 4.0 * layers * width * seen


def kept_weights(model: Any, packed: bool) -> AbstractContextManager:
    """GraftLM's weights as the processor multiplies by them fastest, if asked for."""
    if not packed:
        return nullcontext()
    import graftlm

    return graftlm.prepacked(model)


# -- memory --------------------------------------------------------------------------------------------------------------
def memory_worker(library: str, name: str, dtype_name: str, folder: str, packed: str) -> None:
    """Highest resident memory of a process that trains three steps with one library; in bytes."""
    import torch

    work, dtype = WORKLOADS[name], getattr(torch, dtype_name)
    model = wrap(__import__(library), load(work, dtype, folder or None), work)
    inputs = batch(work, model.config.vocab_size)
    if work.accumulate:
        inputs["num_items_in_batch"] = (inputs["labels"][:, 1:] != -100).sum()
    runner = Runner(library, model, inputs, work.accumulate)
    memory_bench.settle("cpu")
    with kept_weights(model, bool(packed) and library == "graftlm"):
        for _ in range(3):
            runner.step(library == "graftlm" or not work.plain_adamw)
    print(json.dumps({"peak": memory_bench.peak("cpu")}))


def peak_memory(library: str, name: str, dtype: str, folder: str, packed: str) -> int:
    command = [sys.executable, __file__, "--worker", library, name, dtype, folder, packed]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{library} on {name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])["peak"]


# -- reports -------------------------------------------------------------------------------------------------------------
def measure(name: str, dtype_name: str, folder: str | None, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one workload in one dtype."""
    import torch

    work, dtype = WORKLOADS[name], getattr(torch, dtype_name)
    theirs, ours = pair(work, dtype, folder)
    row: dict[str, Any] = {"workload": name, "dtype": dtype_name, "difference": compare(theirs, ours)}
    with kept_weights(ours.model, args.prepacked):
        times = alternate(theirs, ours, work, args.rounds)
    middle = {k: statistics.median(v) for k, v in times.items()}
    own = middle["graftlm"] + middle["graftlm fused"]
    row |= {
        "ratio": (middle["peft"] + middle["peft adamw"]) / own,
        "same_optimiser": (middle["peft"] + middle["peft fused"]) / own,
        "floor": useful_flops(work, ours.model) / peak_flops(dtype) / own,
        "seconds": middle,
    }
    row["peft_floor"] = row["floor"] / row["ratio"]
    del theirs, ours
    gc.collect()
    if not args.no_memory:
        packed = "prepacked" if args.prepacked else ""
        peaks = {library: peak_memory(library, name, dtype_name, folder or "", packed) for library in ("peft", "graftlm")}
        row |= {"peaks": peaks, "memory": peaks["graftlm"] / peaks["peft"]}
    return row


def line(row: dict[str, Any]) -> str:
    half = row["dtype"] == "bfloat16"
    goal = GOALS[row["workload"]]
    memory = f"{row['memory']:.2f} (<= {goal[2 + half]:.2f})" if "memory" in row else "-"
    return (
        f"{row['workload']:13} {row['dtype']:9} {row['ratio']:5.2f}x (>= {goal[half]:.2f}) same optimiser "
        f"{row['same_optimiser']:5.2f}x  floor {row['floor']:4.0%} (HF PEFT {row['peft_floor']:4.0%})  memory {memory:16} "
        f"difference loss {row['difference']['loss']:.0e} gradient {row['difference']['gradient']:.0e} "
        f"(rounding {row['difference']['rounding']:.0e})"
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of the time ratios, and of memory, by workload."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = [f"{r['workload']}\n{'bf16' if r['dtype'] == 'bfloat16' else 'fp32'}" for r in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4), layout="constrained")
    left.bar(labels, [r["ratio"] for r in rows], color="#3b6ea5")
    left.axhline(1, color="black", linewidth=0.8)
    left.set_ylabel("HF PEFT's time / GraftLM's")
    right.bar(labels, [r.get("memory", 0) for r in rows], color="#7a9e5f")
    right.axhline(1, color="black", linewidth=0.8)
    right.set_ylabel("GraftLM's peak memory / HF PEFT's")
    for axes in (left, right):
        axes.tick_params(axis="x", labelsize=7)
    figure.savefig(path, dpi=110)


def workloads(args: argparse.Namespace) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = None
        if "qlora" in args.workloads:
            memory_bench.build("glm-1b", Path(name))
            folder = name
        for work in args.workloads:
            for dtype in args.dtype:
                rows.append(measure(work, dtype, folder, args))
                print(line(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    if args.plot:
        plot(rows, args.plot)


# -- sweep ---------------------------------------------------------------------------------------------------------------
FAMILIES = ["bloom", "opt", "gpt2", "llama", "qwen2", "falcon", "t5"]


def families() -> dict[str, Callable[[Any], Any]]:
    """Models of `FAMILIES` with some thirty million parameters in their blocks."""
    import transformers as t

    sizes = {"vocab_size": 32000, "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8}
    gated = sizes | {"intermediate_size": 1408, "num_key_value_heads": 2}
    configs = {
        "bloom": (t.BloomForCausalLM, t.BloomConfig(vocab_size=32000, hidden_size=512, n_layer=6, n_head=8)),
        "opt": (t.OPTForCausalLM, t.OPTConfig(**sizes, ffn_dim=2048, word_embed_proj_dim=512)),
        "gpt2": (t.GPT2LMHeadModel, t.GPT2Config(vocab_size=32000, n_embd=512, n_layer=6, n_head=8)),
        "llama": (t.LlamaForCausalLM, t.LlamaConfig(**gated)),
        "qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config(**gated)),
        "falcon": (t.FalconForCausalLM, t.FalconConfig(**sizes)),
        "t5": (
            t.T5ForConditionalGeneration,
            t.T5Config(vocab_size=32000, d_model=512, num_layers=6, num_heads=8, d_ff=2048, decoder_start_token_id=0),
        ),
    }

    def maker(kind: Any, config: Any) -> Callable[[Any], Any]:
        def make(dtype: Any) -> Any:
            import torch

            torch.manual_seed(0)
            return kind(copy.deepcopy(config)).to(dtype)

        return make

    return {name: maker(*pair_) for name, pair_ in configs.items()}


METHODS = {
    "lora": ("LoraConfig", {"r": 16, "lora_dropout": 0.05}),
    "lora-all": ("LoraConfig", {"r": 64, "target_modules": "all-linear"}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 16}),
    "p-tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 16}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 16}),
}
SHAPES = {
    "ragged, all labelled": {"lengths": uniform(20, 160, 6, 7)},
    "full, all labelled": {"lengths": [96] * 4},
    "long, few labelled": {"lengths": [500, 480], "labelled": 8},
    "one short row": {"lengths": [40]},
}


def sweep(args: argparse.Namespace) -> None:
    """Time ratios over families, methods, dtypes and batches; exits with an error where HF PEFT is clearly faster."""
    import torch

    slow = []
    print(f"{'family':8} {'method':10} {'dtype':9} " + " ".join(f"{name:>22}" for name in SHAPES))
    for family, make in ((f, m) for f, m in families().items() if f in args.families):
        for method, settings in METHODS.items():
            for dtype in args.dtype:
                cells = []
                for shape in SHAPES.values():
                    work = Workload(make, settings, **shape)  # type: ignore[arg-type]
                    try:
                        theirs, ours = pair(work, getattr(torch, dtype), None)
                    except Incomparable as reason:
                        print(f"{family:8} {method:10} {dtype:9} {reason}", flush=True)
                        break
                    times = alternate(theirs, ours, work, args.rounds)
                    cells.append(statistics.median(times["peft"]) / statistics.median(times["graftlm"]))
                if len(cells) < len(SHAPES):
                    continue
                print(f"{family:8} {method:10} {dtype:9} " + " ".join(f"{c:21.2f}x" for c in cells), flush=True)
                slow += [(family, method, dtype, name, c) for name, c in zip(SHAPES, cells, strict=True) if c < 0.95]
    for case in slow:
        print("slower than HF PEFT:", *case)
    if slow:
        raise SystemExit(1)


# -- what users feel -----------------------------------------------------------------------------------------------------
def seconds(call: Callable[[], Any], times: int = 1) -> float:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def overheads(args: argparse.Namespace) -> None:
    """Wrapping, first step, saving, switching, and the Trainer on the bundled base."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    import graftlm

    work = Workload(glm, ("LoraConfig", LORA | {"target_modules": ["q_proj", "v_proj"]}), uniform(60, 200, 6, 5))
    with tempfile.TemporaryDirectory() as name:
        memory_bench.build("glm-1b", Path(name))
        models: list[Any] = []
        wrap(graftlm, families()["llama"](torch.bfloat16), work)  # what a process does once (imports, choice of products)

        def read() -> None:
            models.append(AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16))
            for parameter in models[0].parameters():  # the file is mapped into memory, and read when it is used
                parameter.sum()

        loading = seconds(read)
        wrapping = seconds(lambda: models.append(wrap(graftlm, models[0], work)))
        print(f"wrapping a 1 B model takes {wrapping / loading:.1%} of loading it")
        model, inputs = models[1], batch(work, 65024)
        runner = Runner("graftlm", model, inputs, False)
        first = sum(runner.step())
        steady = statistics.median(sum(runner.step()) for _ in range(3))
        print(f"the first step takes {first / steady:.2f} of a later one")
        theirs = wrap(peft, AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16), work)
        saves = [seconds(lambda m=m: m.save_pretrained(Path(name) / "adapter"), 5) for m in (theirs, model)]
        print(f"saving: HF PEFT's time / GraftLM's {saves[0] / saves[1]:.2f}")
    switching(args)
    trainers(args)


def switching(args: argparse.Namespace) -> None:
    """`set_adapter` between two of 2, and two of 100, adapters."""
    import graftlm

    times = {}
    for count in (2, 100):
        base = families()["llama"](__import__("torch").float32)
        config = graftlm.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
        model = graftlm.get_peft_model(base, config, "a0")
        for i in range(1, count):
            model.add_adapter(f"a{i}", copy.deepcopy(config))
        names = iter([f"a{i % 2 * (count - 1)}" for i in range(201)])
        times[count] = seconds(lambda m=model, n=names: m.set_adapter(next(n)), 200)
    print(f"switching among 100 adapters takes {times[100] / times[2]:.2f} of switching between 2")


def trainers(args: argparse.Namespace) -> None:
    """Steps a second of GraftLM with its Trainer and HF PEFT with transformers', on the bundled base."""
    import peft
    import torch
    import transformers

    import graftlm
    from graftlm.training import Trainer, resolve_base

    speeds: dict[str, list[float]] = {"peft": [], "graftlm": []}
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(160):
        ids = torch.randint(5, 2000, (20 + i % 40,), generator=generator)
        rows.append({"input_ids": ids.tolist(), "labels": ids.tolist()})
    for _ in range(args.rounds):
        for name, library, kind in (("peft", peft, transformers.Trainer), ("graftlm", graftlm, Trainer)):
            base, tokenizer = resolve_base("graftlm-base", device="cpu")
            model = library.get_peft_model(base, library.LoraConfig(task_type="CAUSAL_LM", r=8))
            with tempfile.TemporaryDirectory() as folder:
                settings = transformers.TrainingArguments(
                    folder, per_device_train_batch_size=8, max_steps=20, report_to="none", save_strategy="no", use_cpu=True,
                    disable_tqdm=True, logging_steps=1000,
                )  # fmt: skip
                collate = transformers.DataCollatorForSeq2Seq(tokenizer)
                output = kind(model, settings, train_dataset=rows, data_collator=collate).train()
                speeds[name].append(output.metrics["train_steps_per_second"])
    ratio = statistics.median(speeds["graftlm"]) / statistics.median(speeds["peft"])
    print(f"Trainer on the bundled base: {ratio:.2f} times HF PEFT's steps a second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(WORKLOADS)}; all")
    parser.add_argument("--against", choices=["peft"], default="peft", help="the rival")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each library")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory runs out")
    parser.add_argument("--prepacked", action="store_true", help="GraftLM keeps the weights in oneDNN's layout too")
    parser.add_argument("--sweep", action="store_true", help="families x methods x dtypes x batches")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES, help="of the sweep")
    parser.add_argument("--overheads", action="store_true", help="what is not the step itself")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--plot", type=Path, default=None)
    parser.add_argument("--worker", nargs=5, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := [w for w in args.workloads if w not in WORKLOADS]:
        parser.error(f"no workload {', '.join(unknown)}; there are {', '.join(WORKLOADS)}")
    args.workloads = args.workloads or list(WORKLOADS)
    warnings.filterwarnings("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    if args.worker:
        memory_worker(*args.worker)
    elif args.sweep:
        sweep(args)
    elif args.overheads:
        overheads(args)
    else:
        workloads(args)


if __name__ == "__main__":
    main()
