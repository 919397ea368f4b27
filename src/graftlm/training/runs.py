"""One run of a recipe, from its base and data to the adapter's directory; `recipes` says what that holds."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed

from .. import fingerprint, processes
from ..architectures import model_dims
from ..architectures.prepacked import prepacked_if_free
from ..data import PackedRows
from ..errors import RecipeError
from ..model import PeftModel
from ..preparation import prepare_model_for_kbit_training
from ..quantization import SCHEMES, is_quantized, scheme_of
from ..routing import Plan, Switch, running
from ..version import __version__
from . import advice
from .arguments import training_arguments
from .bases import resolve_base
from .compiling import CompiledLayers
from .defaults import defaults_of
from .evaluation import Evaluation, is_encoder_decoder
from .live import ProgressFile
from .measuring import check_baseline, measure, samples_of
from .output import RECIPE_NAME, check_shared, open_output, write_recipe
from .progress import RichProgress
from .results import RunResult, finish
from .resume import last_complete_checkpoint
from .schema import Recipe
from .setup import RunData, attach, load_data_of
from .sharding import BY_ZERO, IN_PARTS, check_scheme, check_strategy, in_words, share_out, traffic
from .surroundings import check_agreement, join_processes, log, only_the_first_speaks, threads
from .trainer import Trainer

Search = Callable[[Recipe, Any, Any, RunData, Callable[[str], None]], Recipe]


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
    search: Search | None = None,
    progress: bool = False,
) -> RunResult:
    """As `recipes.run`, with a `search` for the learning rate of a recipe that leaves it to one."""
    if (model is None) != (tokenizer is None):
        raise RecipeError("run(model=…, tokenizer=…): give both, or neither")
    if model is not None:
        recipe = over(model, recipe)
    join_processes()
    check_strategy(recipe.training.strategy, model is not None, member is not None)
    strategy = recipe.training.strategy
    in_parts = strategy in IN_PARTS and processes.count() > 1
    output = processes.of_first(lambda: open_output(recipe)) or Path(recipe.output_dir)
    quiet = quiet or not processes.is_first()
    quietly = only_the_first_speaks() if member is None else nullcontext()
    with threads(recipe.training.threads), quietly:
        set_seed(recipe.training.seed)
        if model is None:
            asked = {"task": recipe.task, "dtype": recipe.dtype, "quantization": recipe.quantization}
            model, tokenizer = resolve_base(recipe.base, **asked, in_memory=in_parts)  # type: ignore[arg-type]
        if in_parts:
            check_scheme(scheme_of(model), strategy)
        made_ready(model, bool(recipe.training.gradient_checkpointing), quiet)
        size = model.get_memory_footprint() if member is None else member.base_bytes  # without other runs' adapters
        form = {"quantization": scheme_of(model), "base_bytes": size}
        data = data or load_data_of(recipe, tokenizer, is_encoder_decoder(model))
        if baseline is not None:
            check_baseline(baseline, data, tokenizer, is_encoder_decoder(model))
        before = baseline
        if before is None and not in_parts:
            before = plain(recipe, model, tokenizer, data)
        dims = model_dims(model)
        recipe = recipe.filled(dims.hidden, len(data.train_rows), dims.layers)
        check_agreement(facts_of(recipe, data, model))
        check_shared(output)
        check_enough(data)
        if recipe.training.learning_rate == "search" and recipe.resume:
            recipe = with_earlier_rate(recipe, output)
        if recipe.training.learning_rate == "search" and search is not None:
            recipe = search(recipe, model, tokenizer, data, log.info if quiet else print)
        set_seed(recipe.training.seed)
        wrapped, recipe = attach(recipe, model, tokenizer, data)
        release = share_out(wrapped, strategy, recipe.training.shard_adapters)
        if in_parts and before is None:
            before = plain(recipe, model, tokenizer, data)
        form |= (exchanged := traffic(wrapped))
        if exchanged and not quiet:
            print(in_words(exchanged))
        if processes.is_first():
            write_recipe(recipe, output)
        try:
            trainer = make_trainer(recipe, wrapped, tokenizer, data, callbacks, quiet)
            trainer.release = release
            if progress:
                trainer.add_callback(ProgressFile(output, trainer.meter, samples_of(wrapped, tokenizer, data)))
            form |= fit(trainer, wrapped, recipe, output, member)
            after = measure(recipe, wrapped, tokenizer, data)
            form |= also(wrapped, tokenizer) if also is not None else {}
            usual = defaults_of(recipe.method).rate(dims.hidden, dims.layers)
            form["note"] = advice.note(recipe, data, before, after, trainer.state.log_history, usual)
            return finish(trainer, wrapped, output, before, after, form)
        finally:
            if recipe.training.gradient_checkpointing and member is None:
                getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
            wrapped.unload()


def plain(recipe: Recipe, model: Any, tokenizer: Any, data: RunData) -> Evaluation | None:
    """Measures of a base without the adapters that it may carry: this run's, and other runs'."""
    with running(Plan(Switch(), ())):
        return measure(recipe, model, tokenizer, data)


def check_enough(data: RunData) -> None:
    """RecipeError where some process would have nothing to train on."""
    if len(data.train_rows) < processes.count():
        raise RecipeError(
            f"{processes.count()} processes for {len(data.train_rows)} rows to train on: each needs one; start fewer"
        )


def facts_of(recipe: Recipe, data: RunData, base: Any) -> dict[str, str]:
    """What the processes of a run must agree on; rows by a digest of their token ids, the base by a few of its values."""
    if processes.count() == 1:
        return {}
    found = {"version of graftlm": __version__, "version of torch": str(torch.__version__)}
    found["base's values"] = hashlib.sha256(repr(fingerprint.of(base)).encode()).hexdigest()[:16]
    for name, rows in (("training rows", data.train_rows), ("held-out rows", data.held_out_rows)):
        known = hashlib.sha256()
        for row in rows if rows is not None else ():
            known.update(repr((row["input_ids"], row["labels"])).encode())
        found[name] = f"{0 if rows is None else len(rows)} of digest {known.hexdigest()[:16]}"
    for key, value in recipe.model_dump().items():
        inner = {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
        found |= {f"recipe's {k}": str(v) for k, v in inner.items()}
    return found


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
    trainer.by_zero = recipe.training.strategy in BY_ZERO
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


def fit(trainer: Trainer, model: PeftModel, recipe: Recipe, output: Path, member: Any) -> dict[str, Any]:
    """Train and save the adapter; a member's own part of the time and of the memory."""
    if member is not None:
        trainer.member, member.trainer = member, trainer
    start = None if member is None else member.spent()
    with kept_twice(model, recipe):
        trainer.train(start_of(recipe, output))
        trainer.save_adapter(output)
        processes.wait()
    return {} if member is None else {"seconds": member.spent() - start, "peak_memory_bytes": member.peak_memory}


def start_of(recipe: Recipe, output: Path) -> str | None:
    """The last complete checkpoint where the recipe resumes; None to start at the beginning."""
    if not recipe.resume:
        return None
    notes: list[str] = []
    checkpoint = last_complete_checkpoint(output, notes)
    for note in notes:
        log.warning(note)
    if checkpoint is None:
        log.warning("There is no complete checkpoint in %s; training starts from the beginning.", output)
    return str(checkpoint) if checkpoint else None


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
