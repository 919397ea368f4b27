"""Running a recipe: base and data in, a trained and measured adapter directory out.

    output_dir/
      adapter_config.json, adapter_model.safetensors, README.md    the adapter, as `save_pretrained` writes it
      recipe.yaml      the recipe with every default filled in
      metrics.json     measures before and after, the log, sample texts
      loss.png         the loss curve
      checkpoint-<n>/  what `resume` goes on from

The same recipe on the same machine gives the same adapter bit for bit, where products are made in the same ways (these are
chosen by timing, see `kernels.linear`; another choice rounds otherwise). Started by `torchrun` or `accelerate launch`, every
process trains on its share of each batch (`batch_size` rows a process), and the first one prints and saves.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments, set_seed

from .. import processes
from ..architectures import model_dims
from ..architectures.prepacked import prepacked_if_free
from ..data import PackedRows
from ..errors import RecipeError
from ..model import PeftModel
from ..preparation import prepare_model_for_kbit_training
from ..quantization import SCHEMES, is_quantized, scheme_of
from ..routing import Plan, Switch, running
from . import advice
from .bases import BaseModelError, resolve_base
from .compiling import CompiledLayers
from .evaluation import Evaluation, answers, evaluation, is_encoder_decoder
from .output import METRICS_NAME, RECIPE_NAME, open_output, write_recipe, write_text
from .progress import RichProgress
from .resume import last_complete_checkpoint
from .schema import DataSection, Recipe, TrainingSection
from .search import with_best_rate
from .setup import RunData, attach, load_data_of
from .trainer import Trainer, has_accelerator, log

__all__ = ["BaseModelError", "DataSection", "Recipe", "RunResult", "TrainingSection", "measure", "resolve_base", "run"]

SAMPLES = 5
SAMPLE_TOKENS = 40


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run gave.

    Attributes:
        output_dir: the adapter directory.
        metrics: loss_before, loss (nats a labelled held-out token), perplexity_before, perplexity, accuracy_before,
            accuracy (None where the data has no labels), trainable_parameters, file_bytes (the weights file), seconds and
            tokens_per_second (training only, evaluation within it counted in seconds), peak_memory_bytes; quantization (how
            the base is quantised, None if not) and base_bytes (its weights in memory).
        history: the Trainer's log_history.
        samples: dicts with prompt, target, before, after.
    """

    output_dir: Path
    metrics: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)


def run(
    recipe: Recipe,
    *,
    model: Any = None,
    tokenizer: Any = None,
    callbacks: Sequence[TrainerCallback] = (),
    quiet: bool = False,
    baseline: Evaluation | None = None,
    member: Any = None,
    data: RunData | None = None,
    also: Callable[[Any, Any], dict[str, Any]] | None = None,
) -> RunResult:
    """Train the recipe's adapter, measure it and save it.

    Args:
        model, tokenizer: a loaded base to use in place of `recipe.base`; it is given back as it was (a quantised one
            prepared for training).
        callbacks: further Trainer callbacks.
        quiet: no progress bar and no lines.
        baseline: `measure(…)` of the plain base on the same held-out data, where it is known already.
        member: its place among several runs that train together (`together.Member`).
        data: the recipe's data, where it is loaded already.
        also: further measures of the trained model, given it and the tokenizer; they join the metrics.

    Raises:
        RecipeError, DataError, ConfigError, BaseModelError: mistakes in the recipe.
        UnsupportedError: what the base, or this machine, cannot do.
        TrainingInterrupted: Ctrl-C; the adapter so far and a checkpoint are saved.
    """
    if (model is None) != (tokenizer is None):
        raise RecipeError("run(model=…, tokenizer=…): give both, or neither")
    if model is not None:
        recipe = over(model, recipe)
    join_processes()
    output = open_output(recipe) if processes.is_first() else Path(recipe.output_dir)
    processes.wait()
    quiet = quiet or not processes.is_first()
    with threads(recipe.training.threads), only_the_first_speaks():
        set_seed(recipe.training.seed)
        if model is None:
            model, tokenizer = resolve_base(
                recipe.base, task=recipe.task, dtype=recipe.dtype, quantization=recipe.quantization
            )
        made_ready(model, bool(recipe.training.gradient_checkpointing), quiet)
        size = model.get_memory_footprint() if member is None else member.base_bytes  # without other runs' adapters
        form = {"quantization": scheme_of(model), "base_bytes": size}
        data = data or load_data_of(recipe, tokenizer, is_encoder_decoder(model))
        with running(Plan(Switch(), ())):  # the base may carry the adapters of other runs
            before = baseline if baseline is not None else measure(recipe, model, tokenizer, data)
        dims = model_dims(model)
        recipe = recipe.filled(dims.hidden, len(data.train_rows), dims.layers)
        if recipe.training.learning_rate == "search" and recipe.resume:
            recipe = with_earlier_rate(recipe, output)
        if recipe.training.learning_rate == "search":
            recipe = with_best_rate(recipe, model, tokenizer, data, log.info if quiet else print)
        set_seed(recipe.training.seed)
        wrapped, recipe = attach(recipe, model, tokenizer, data)
        if processes.is_first():
            write_recipe(recipe, output)
        try:
            trainer = make_trainer(recipe, wrapped, tokenizer, data, callbacks, quiet)
            if member is not None:
                trainer.member, member.trainer = member, trainer
            start = None if member is None else member.spent()
            with kept_twice(wrapped, recipe):
                fit(trainer, recipe, output)
            if member is not None:  # its own part of the time and of the memory
                form |= {"seconds": member.spent() - start, "peak_memory_bytes": member.peak_memory}
            after = measure(recipe, wrapped, tokenizer, data)
            if also is not None:
                form |= also(wrapped, tokenizer)
            form["note"] = advice.note(recipe, data, before, after, trainer.state.log_history)
            return finish(trainer, wrapped, output, before, after, form)
        finally:
            if recipe.training.gradient_checkpointing and member is None:
                getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
            wrapped.unload()


def join_processes() -> None:
    """Let the processes that torchrun or accelerate started know each other, each on its own GPU where there are any."""
    if processes.count() > 1:
        from accelerate import PartialState

        PartialState(cpu=not has_accelerator())


@contextmanager
def only_the_first_speaks() -> Iterator[None]:
    """Within the block the other processes of a run print no lines, warnings and notices; errors they raise as ever."""
    if processes.is_first():
        yield
        return
    logger = logging.getLogger("graftlm")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def with_earlier_rate(recipe: Recipe, output: Path) -> Recipe:
    """The recipe with the learning rate that a run to be resumed has found; as it is where that run has no checkpoint."""
    file = output / RECIPE_NAME
    if not file.is_file() or last_complete_checkpoint(output, []) is None:
        return recipe
    rate = Recipe.from_yaml(file).training.learning_rate
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"learning_rate": rate})})


def over(model: Any, recipe: Recipe) -> Recipe:
    """The recipe with the quantisation of a base that is given loaded. RecipeError: it asks for another one."""
    have = scheme_of(model)
    if recipe.quantization not in (None, have):
        raise RecipeError(
            f"quantization: {recipe.quantization}, but the base that was given is {have or 'not quantised'}; load it by "
            f"resolve_base(…, quantization={recipe.quantization!r}), or leave quantization out"
        )
    return recipe.model_copy(update={"quantization": have}) if have in SCHEMES else recipe


def made_ready(model: Any, checkpointing: bool, quiet: bool) -> None:
    """Prepare a quantised base for training; once more changes nothing."""
    if is_quantized(model):
        with redirect_stdout(io.StringIO()) if quiet else nullcontext():
            prepare_model_for_kbit_training(model, checkpointing)


def measure(recipe: Recipe, model: Any, tokenizer: Any, data: RunData | None = None) -> Evaluation | None:
    """Loss and (for label tasks) accuracy on the recipe's held-out data, and generated texts of at least its first rows.

    None where the recipe holds out nothing.
    """
    data = data or load_data_of(recipe, tokenizer, is_encoder_decoder(model))
    if data.held_out is None:
        return None
    found = evaluation(
        model, tokenizer, data.held_out, data.format, batch_size=recipe.training.eval_batch_size,
        truncation=recipe.data.truncation,
    )  # fmt: skip
    if found.outputs:
        return found
    rows = data.sample_rows(SAMPLES, tokenizer, is_encoder_decoder(model))
    if rows is None:
        return found
    outputs = answers(model, tokenizer, rows, data.format, recipe.training.eval_batch_size, SAMPLE_TOKENS)
    return Evaluation(
        metrics=found.metrics, prompts=tuple(rows["prompt"]), targets=tuple(rows["target"]), outputs=tuple(outputs)
    )


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


def make_trainer(
    recipe: Recipe, model: PeftModel, tokenizer: Any, data: RunData, callbacks: Sequence[TrainerCallback], quiet: bool
) -> Trainer:
    """The trainer of a run."""
    trainer = Trainer(
        model,
        training_arguments(recipe, data.held_out_rows is not None, model._float_dtype()),
        data_collator=data.collator,
        train_dataset=packed(recipe, model, data) if recipe.training.packing else data.train_rows,
        eval_dataset=data.held_out_rows,
        callbacks=list(callbacks),
    )
    if recipe.training.early_stopping and data.held_out_rows is not None:
        trainer.add_callback(EarlyStoppingCallback(recipe.training.early_stopping))
    if recipe.training.torch_compile:
        trainer.add_callback(CompiledLayers(trainer))
    if quiet:
        trainer.remove_callback(RichProgress)
    return trainer


def packed(recipe: Recipe, model: PeftModel, data: RunData) -> PackedRows:
    """The training rows in steps of a token budget. RecipeError where the base cannot take them."""
    if is_encoder_decoder(model):
        raise RecipeError("training.packing is for decoder-only models; leave it out for encoder-decoder ones")
    if not model.can_pack():
        raise RecipeError(
            f"training.packing: {type(model.base).__name__} gives other results for packed rows here (its attention cannot "
            "keep sequences apart, or this is a GPU); leave packing out, its batches are then padded"
        )
    return PackedRows(data.train_rows, recipe.training.tokens, recipe.training.seed)


def fit(trainer: Trainer, recipe: Recipe, output: Path) -> None:
    """Train, from the last complete checkpoint where the recipe resumes."""
    checkpoint = None
    if recipe.resume:
        notes: list[str] = []
        checkpoint = last_complete_checkpoint(output, notes)
        for note in notes:
            log.warning(note)
        if checkpoint is None:
            log.warning("There is no complete checkpoint in %s; training starts from the beginning.", output)
    trainer.train(str(checkpoint) if checkpoint else None)
    trainer.save_adapter(output)
    processes.wait()


@contextmanager
def kept_twice(model: PeftModel, recipe: Recipe) -> Iterator[None]:
    """Within the block, `training.prepacked`: the base's weights as this processor multiplies by them fastest, where that
    takes less than half of the free memory."""
    if not recipe.training.prepacked:
        yield
        return
    with prepacked_if_free(model, copies=2) as size:
        if not size:
            log.warning(
                "training.prepacked is left out: it is for a frozen base in fp32 or bf16, on a CPU that oneDNN serves, with "
                "free memory of four times its weights"
            )
        yield


def finish(
    trainer: Trainer,
    model: PeftModel,
    output: Path,
    before: Evaluation | None,
    after: Evaluation | None,
    form: dict[str, Any],
) -> RunResult:
    """Collect the measures, put them into the card and `metrics.json`. `form`: quantisation and bytes of the base, and what
    else was measured."""
    metrics: dict[str, Any] = {}
    for name in ("loss", "perplexity", "accuracy"):
        metrics[f"{name}_before"] = before.metrics[name] if before else None
        metrics[name] = after.metrics[name] if after else None
    end: dict[str, Any] = next((e for e in reversed(trainer.state.log_history) if "train_runtime" in e), {})
    metrics |= {
        "trainable_parameters": model.get_nb_trainable_parameters()[0],
        "file_bytes": sum(p.stat().st_size for p in output.glob("adapter_model.safetensors")),
        "seconds": end.get("train_runtime"),
        "tokens_per_second": end.get("train_tokens_per_second"),
        "peak_memory_bytes": end.get("peak_memory_bytes"),
    } | form
    if "seconds" in form:
        metrics["tokens_per_second"] = trainer.meter.tokens / form["seconds"] if form["seconds"] else 0.0
    samples = [
        {"prompt": p, "target": t, "before": b, "after": a}
        for p, t, b, a in zip(after.prompts, after.targets, before.outputs, after.outputs, strict=True)
    ][:SAMPLES] if before and after else []  # fmt: skip
    result = RunResult(output_dir=output, metrics=metrics, history=trainer.state.log_history, samples=samples)
    if not processes.is_first():
        return result
    shown = {CARD_NAMES[k]: v for k, v in metrics.items() if k in CARD_NAMES and v is not None}
    model.card_metrics.update(shown)
    model.create_or_update_model_card(output)
    write_text(
        output / METRICS_NAME, json.dumps(finite(asdict(result) | {"output_dir": str(output)}), indent=1, ensure_ascii=False)
    )
    return result


CARD_NAMES = {
    "loss_before": "held-out loss of the base", "loss": "held-out loss",
    "perplexity_before": "held-out perplexity of the base", "perplexity": "held-out perplexity",
    "accuracy_before": "held-out accuracy of the base", "accuracy": "held-out accuracy",
    "quantization": "base quantised to", "base_bytes": "base in memory, bytes",
}  # fmt: skip


def finite(value: Any) -> Any:
    """The value with infinities and NaN as None, which JSON cannot hold."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Within the block torch runs on `count` CPU threads."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def recipe_of(folder: str | os.PathLike) -> Recipe:
    """The recipe that an adapter directory was trained with."""
    return Recipe.from_yaml(Path(folder) / "recipe.yaml")
