"""What users feel besides the steps: `training.py --overheads`."""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import memory as memory_bench
from rivals import Runner
from training_sweep import families
from workloads import LORA, Workload, batch, glm, uniform, wrap


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
