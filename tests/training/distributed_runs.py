"""Runs that two processes and one process make alike: what `test_training_distributed` compares."""

from __future__ import annotations

import importlib.util
import os
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers as t
from families import build, task
from safetensors.torch import load_file
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from training_helpers import NEEDED, PLAIN, WORDS, trained, uneven

from graftlm import get_peft_model, processes
from graftlm.kernels import linear
from graftlm.quantization import quantized_layers
from graftlm.training import Recipe, Together, Trainer, run, runs
from graftlm.training.defaults import config_type, defaults_of, method_names
from graftlm.training.sharding import base_parameters, shard, shard_by_zero, stacks, traffic
from graftlm.training.surroundings import join_processes

KEYS = ("loss", "grad_norm", "eval_loss", "epoch_train_loss")
BATCH = 4  # rows an update, over all processes


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run of `rows` rows. `overrides` are of the base's configuration, `options` of the method's; `arguments` the
    Trainer's."""

    method: str = "lora"
    family: str = "llama"
    rows: int = 7
    sharded: bool = False
    parts: bool = False  # of the adapter
    zero: int = 0  # the stage: 2, 3
    overrides: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)


OPTIONS: dict[str, dict[str, Any]] = NEEDED | {
    "adalora": {"init_r": 6, "target_r": 3, "tinit": 1, "tfinal": 1, "deltaT": 1, "orth_reg_weight": 0.5},
    "cartridge": {"num_virtual_tokens": 4},
    "prompt-tuning": {"num_virtual_tokens": 3},
    "prefix-tuning": {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 12},
    "fourierft": {"n_frequency": 100},
    "p-tuning": {"num_virtual_tokens": 3, "encoder_hidden_size": 12},
}

CASES = {f"method-{name}": Case(method=name) for name in sorted(method_names())} | {
    "five-rows": Case(rows=5),  # the second process has none of the last batch
    "five-rows-penalised": Case(rows=5, method="adalora"),
    "five-rows-padded": Case(rows=5, family="falcon"),
    "smoothing": Case(arguments={"label_smoothing_factor": 0.1}),
    "smoothing-padded": Case(family="falcon", arguments={"label_smoothing_factor": 0.1}),
    "accumulation": Case(rows=16, arguments={"gradient_accumulation_steps": 2}),
    "accumulation-uneven": Case(rows=13, arguments={"gradient_accumulation_steps": 2}),
    "checkpointing": Case(arguments={"gradient_checkpointing": True}),
    "seq2seq": Case(family="t5", overrides={"dropout_rate": 0.0}),
    "bloom": Case(family="bloom", method="prefix-tuning"),
}


WHOLE = dict(CASES)
CASES |= {f"fsdp2-{name}": replace(case, sharded=True) for name, case in WHOLE.items()}
CASES |= {
    f"parts-{name}": replace(case, sharded=True, parts=True)
    for name, case in WHOLE.items()
    if name.startswith(("method", "accumulation-u", "check")) and case.method != "adalora"
}
BY_ZERO = ("method", "accumulation", "check", "five-rows-padded", "seq2seq", "bloom")
CASES |= {
    f"zero{stage}-{name}": replace(case, zero=stage)
    for stage in (2, 3)
    for name, case in WHOLE.items()
    if name.startswith(BY_ZERO) and case.method != "adalora"
}
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


def can_run(name: str) -> bool:
    """Whether what a case or a run needs is installed."""
    return HAS_DEEPSPEED or not name.startswith("zero")


EPSILON = 1e-3  # of Adam: else the last bit of a gradient that is all but zero makes an update of the learning rate


def exactly(patch: Callable[[Any, str, Any], None]) -> None:
    """Products in one way, whatever their rows (ways that are chosen by timing round differently), Adam by EPSILON, and int8
    without outliers: bitsandbytes takes these out by columns of a whole batch (`test_training_int8_batches`)."""
    patch(linear, "way", lambda dtype, rows, transposed: torch.nn.functional.linear)
    resolve, arguments = runs.resolve_base, runs.training_arguments
    patch(runs, "resolve_base", lambda *given, **named: without_outliers(*resolve(*given, **named)))
    patch(runs, "training_arguments", lambda *given: replace_in(arguments(*given)))


def without_outliers(base: Any, tokenizer: Any) -> tuple[Any, Any]:
    for kind, layer in quantized_layers(base):
        if kind == "int8":
            layer.state.threshold = 0.0
    return base, tokenizer


def replace_in(arguments: t.TrainingArguments) -> t.TrainingArguments:
    arguments.adam_epsilon = EPSILON
    return arguments


def rows_of(case: Case) -> list[dict[str, torch.Tensor]]:
    rows = uneven(case.rows)
    return [row | {"labels": row["input_ids"].masked_fill(row["attention_mask"] == 0, -100)} for row in rows]


def result_of(case: Case, steps: int, folder: Path) -> dict[str, Any]:
    """Losses, measures and parameters of a run of so many updates."""
    base = build(case.family, **case.overrides)
    torch.manual_seed(3)
    options = defaults_of(case.method).options | OPTIONS.get(case.method, {}) | case.options
    model = get_peft_model(base, config_type(case.method)(task_type=task(case.family), **options))
    if case.sharded and processes.count() > 1:
        shard(model, case.parts)
    release = shard_by_zero(model) if case.zero == 3 and processes.count() > 1 else None
    rate = min(defaults_of(case.method).rate(32, 2), 2e-3)
    values = PLAIN | {
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": BATCH // processes.count(),
        "per_device_eval_batch_size": BATCH // processes.count(), "learning_rate": rate, "logging_steps": 1,
        "adam_epsilon": EPSILON,
        "save_strategy": "no", "eval_strategy": "epoch", "seed": 7,
    }  # fmt: skip
    trainer = Trainer(
        model, t.TrainingArguments(**(values | case.arguments)), train_dataset=rows_of(case), eval_dataset=rows_of(case)[:7]
    )
    trainer.by_zero, trainer.release = bool(case.zero), release
    trainer.train()
    history = trainer.state.log_history
    parameters = {k: p.full_tensor() if isinstance(p, DTensor) else p for k, p in trained(model).items()}
    return {key: [e[key] for e in history if key in e] for key in KEYS} | {"parameters": parameters}


# -- whole recipes -------------------------------------------------------------------------------------------------------
def save_rows(folder: Path, train: int = 13, test: int = 5) -> Path:
    """Labelled tweets of different lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", train), ("test", test)):
        lines = [
            f"{' '.join(WORDS[(i + j) % 15] for j in range(2 + i * 5 % 7))},{'bad' if i % 2 else 'good'}"
            for i in range(count)
        ]
        (folder / f"{name}.csv").write_text("\n".join(["Tweet text,text_label", *lines]) + "\n", encoding="utf-8")
    return folder


WHOLE_ADAPTERS = ("training.strategy=ddp", "training.shard_adapters=false")
RUNS = ("packing", "packing-fsdp2", "early-stop", "int8", "nf4", "joint", "joint-seq2seq", "fsdp2", "parts", "resumed")
RUNS += ("zero2-resumed", "zero2-nf4", "zero3-resumed", "zero3-packing")
# Without `slow`: one method of each entry point and of each kind of parameter, the runs that differ most, and FSDP2 where
# the processes differ in what they hold. All of them, for many more steps, are `slow`.
OFTEN = ("lora", "adalora", "prompt-tuning", "prefix-tuning", "bottleneck", "trainable-tokens")
QUICK = [f"method-{name}" for name in (*OFTEN, "vera", "p-tuning")]
QUICK += ["five-rows", "five-rows-penalised", "smoothing", "accumulation-uneven", "checkpointing", "seq2seq", "bloom"]
QUICK += ["fsdp2-five-rows", "parts-accumulation-uneven", *(f"fsdp2-method-{name}" for name in OFTEN)]
QUICK += ["zero2-method-lora", "zero2-accumulation-uneven", *(f"zero3-method-{n}" for n in OFTEN if n != "adalora")]
OFTEN_RUN = ("packing", "early-stop", "nf4", "joint", "parts", "resumed", "zero2-resumed", "zero3-resumed")


def recipes_of(name: str, place: Path, steps: int, out: Path) -> list[Recipe]:
    """The recipes that run together under a name; `place` has base and data."""
    count = processes.count()
    often = {"eval_strategy": "steps", "save_strategy": "steps", "interval": 1}
    training: dict[str, Any] = {
        "max_steps": steps, "batch_size": BATCH // count, "eval_batch_size": 4 // count, "learning_rate": 1e-2, "threads": 1,
        "logging_steps": 1, "save_strategy": "no", "load_best": False,
    }  # fmt: skip
    values: dict[str, Any] = {"base": str(place / "base"), "data": {"source": str(place / "data")}}
    methods: list[dict[str, Any]] = [{"method": "lora", "method_options": {"lora_dropout": 0.0}}]
    if "packing" in name:  # a pack a process and step
        training |= {"packing": True, "tokens": 32, "accumulation": BATCH // 2 // count}
    if name.endswith("fsdp2") and count > 1:
        training["strategy"] = "fsdp2"
    if name == "early-stop":
        training |= often | {"early_stopping": 1, "learning_rate": 0.2, "max_steps": 20}
    if name == "parts":
        training |= often | {"load_best": True}
    if name.startswith("zero") and count > 1:
        training["strategy"] = name[:5]
    if name.endswith("resumed"):
        training |= {"save_strategy": "steps", "interval": 1, "schedule": "constant"}
    if name in ("parts", "resumed") and count > 1:
        training |= {"strategy": "fsdp2", "shard_adapters": True}
    if name.endswith(("int8", "nf4")):
        # fp32: a processor with bf16 would round 4-bit layers' activations to it, which tips over by a last bit
        values |= {"quantization": name[-4:].strip("-"), "base": str(place / "wide"), "dtype": "fp32"}
    if name.startswith("joint"):
        penalised = {"tinit": 1, "tfinal": 1, "deltaT": 1, "orth_reg_weight": 0.5}
        methods += [{"method": "adalora", "method_options": penalised}, {"method": "prompt-tuning"}]
    if name == "joint-seq2seq":
        values["base"] = str(place / "seq2seq")
    return [
        Recipe.from_dict(values | method | {"training": training, "output_dir": str(out / str(i))})
        for i, method in enumerate(methods)
    ]


def run_of(name: str, place: Path, steps: int, out: Path) -> dict[str, Any]:
    """Losses, measures and parameters of the recipes of a name, side by side."""
    recipes = recipes_of(name, place, steps, out)
    if len(recipes) > 1:
        together = Together(quiet=True)
        for recipe in recipes:
            together.add(recipe)
        outcomes = together.run()
        assert together.passes["joint"] > 0 and [o.error for o in outcomes] == [None] * len(recipes), outcomes
        results = [outcome.result for outcome in outcomes]
    else:
        results = [run(recipes[0], quiet=True)]
    if name.endswith("resumed"):
        whole = recipes[0].replace(f"training.max_steps={steps + 2}", *WHOLE_ADAPTERS, resume=True)
        run(whole, quiet=True)
        results = [run(recipes[0].replace(f"training.max_steps={steps + 4}", resume=True), quiet=True)]
    histories = [result.history for result in results if result is not None]
    found = {key: [e[key] for history in histories for e in history if key in e] for key in KEYS}
    found["held_out"] = [result.metrics["loss"] for result in results if result is not None]
    processes.wait()
    files = [load_file(out / str(i) / "adapter_model.safetensors") for i in range(len(recipes))]
    return found | {"parameters": {f"{i} {k}": v for i, file in enumerate(files) for k, v in file.items()}}


def measured(out: Path) -> dict[str, Any]:
    """What travels in an update, counted where it is sent, and what the run says of it; what is held of a sharded base."""
    sent: dict[str, int] = {"gradient_bytes": 0, "gathered_bytes": 0}

    def counting(state: Any, bucket: Any) -> Any:
        sent["gradient_bytes"] += bucket.buffer().nbytes
        return allreduce_hook(None, bucket)

    counting.__annotations__ = {}  # torch compares what is said of the bucket, as an object

    class Counted(t.TrainerCallback):
        """Counts the second update alone: the first one tries passes out."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            sent[self.key] = 0
            wrapped = self.trainer.model_wrapped
            if state.global_step == 0 and hasattr(wrapped, "register_comm_hook"):
                wrapped.register_comm_hook(None, counting)

    def two_updates(model: Any, key: str) -> None:
        values = PLAIN | {"output_dir": str(out), "max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no"}
        counted = Counted()
        trainer = Trainer(model, t.TrainingArguments(**values), train_dataset=rows_of(Case()), callbacks=[counted])
        counted.key, counted.trainer = key, trainer
        trainer.train()

    model = get_peft_model(build("llama"), config_type("lora")(task_type="CAUSAL_LM"))
    two_updates(model, "gradient_bytes")
    told = traffic(model)
    parts = get_peft_model(build("llama"), config_type("lora")(task_type="CAUSAL_LM"))
    whole = sum(p.nbytes for _, blocks in stacks(parts.base) for b in blocks for p in base_parameters(b))
    shard(parts)
    held = sum(p.to_local().nbytes for p in base_parameters(parts.base) if isinstance(p, DTensor))
    # what fully_shard gathers by, in newer and older versions of torch
    name = "all_gather_single" if hasattr(torch.distributed, "all_gather_single") else "all_gather_into_tensor"
    gather = getattr(torch.distributed, name)

    def counted(output: torch.Tensor, *given: Any, **named: Any) -> Any:
        sent["gathered_bytes"] += output.nbytes // 2
        return gather(output, *given, **named)

    setattr(torch.distributed, name, counted)
    two_updates(parts, "gathered_bytes")
    setattr(torch.distributed, name, gather)
    told["gathered_bytes"] = traffic(parts)["gathered_bytes"]
    return {"sent": sent, "told": told, "whole": whole, "held": held}


def made_of(name: str, place: Path, steps: int, out: Path) -> dict[str, Any]:
    """What came of a case or of a run."""
    if name == "measured":
        return measured(out)
    return result_of(CASES[name], steps, out) if name in CASES else run_of(name, place, steps, out)


def process(rank: int, port: int, names: Sequence[str], place: Path, steps: int, folder: Path) -> None:
    """One of two processes: every case and run, one after the other."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    exactly(setattr)
    join_processes()
    for name in names:
        started = time.time()
        try:
            found = made_of(name, place, steps, folder / f"{name}-out")
        except Exception as error:  # told by the case's own test
            found = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        torch.save(found, folder / f"{name}.{rank}.pt")
        if os.environ.get("SHOW") and rank == 0:
            print(name, f"{time.time() - started:.1f}", found.get("error", ""), flush=True)
    processes.leave()


def in_two_processes(work: Callable[..., None], *arguments: Any) -> None:
    """Run `work(rank, port, …)` in two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, *arguments), nprocs=2)
