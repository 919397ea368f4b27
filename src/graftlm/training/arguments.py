"""A recipe in transformers' words, and what of it this machine can do."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from transformers import TrainingArguments

from ..errors import ConfigError
from .schema import Recipe


def training_arguments(recipe: Recipe, held_out: bool, dtype: torch.dtype) -> TrainingArguments:
    """The recipe in transformers' words."""
    t = recipe.training
    evaluates = t.eval_strategy if held_out else "no"
    return TrainingArguments(
        output_dir=recipe.output_dir,
        num_train_epochs=t.epochs,
        max_steps=t.max_steps or -1,
        per_device_train_batch_size=1 if t.packing else t.batch_size,
        per_device_eval_batch_size=t.eval_batch_size,
        gradient_accumulation_steps=t.accumulation,
        learning_rate=t.learning_rate,
        lr_scheduler_type=t.schedule,
        warmup_steps=t.warmup_ratio,
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        label_smoothing_factor=t.label_smoothing,
        seed=t.seed,
        data_seed=t.seed,
        fp16=dtype is torch.float16 and has_accelerator(),
        use_cpu=not has_accelerator(),
        eval_strategy=evaluates,
        save_strategy=t.save_strategy,
        eval_steps=t.interval,
        save_steps=t.interval,
        logging_steps=t.logging_steps,
        save_total_limit=t.keep_checkpoints,
        load_best_model_at_end=t.load_best and evaluates == t.save_strategy != "no",
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        **checkpointing(t.gradient_checkpointing),
        report_to=t.report_to or "none",
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,  # looking for them makes the logits of every step
        disable_tqdm=False,
    )


def checkpointing(wanted: bool | int) -> dict[str, Any]:
    """The arguments that switch activation checkpointing on (a number n: of each n-th layer), under the name that this
    version of transformers has."""
    if not wanted:
        return {}
    names = {f.name for f in fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    options = {"use_reentrant": False} | ({"every_n_layers": wanted} if wanted > 1 else {})
    return {name: True, f"{name}_kwargs": options}


def check_precision(args: TrainingArguments | None) -> None:
    """ConfigError for fp16 where training runs on a CPU."""
    if args is not None and args.fp16 and (args.use_cpu or not has_accelerator()):
        raise ConfigError("fp16=True needs a GPU: a CPU cannot train in fp16. Use bf16=True, or neither for fp32.")


def has_accelerator() -> bool:
    """Whether torch sees any accelerator."""
    return torch.cuda.is_available() or bool(getattr(torch, "accelerator", None) and torch.accelerator.is_available())
