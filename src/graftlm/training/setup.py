"""From a recipe to tokenised data and an attached adapter."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from .. import bundled
from ..data import (
    CausalLMCollator,
    Format,
    PackingCollator,
    Seq2SeqCollator,
    get_format,
    load_data,
    prepare,
    prompts_and_targets,
)
from ..errors import DataError, RecipeError
from ..methods import PeftConfig, TaskType
from ..model import PeftModel, get_peft_model
from .defaults import config_type, defaults_of, method_type
from .evaluation import FirstTokenMasked, no_bars
from .schema import DataSection, Recipe

INIT_FIELDS = ("init_weights", "init_text", "prompt_tuning_init", "prompt_tuning_init_text")


@dataclass(frozen=True, kw_only=True)
class RunData:
    """A run's data: rows as text (`train`, `held_out`), rows as tokens (`train_rows`, `held_out_rows`), format, collator."""

    format: Format
    train: Any
    held_out: Any
    train_rows: Any
    held_out_rows: Any
    collator: Any

    def sample_rows(self, count: int, tokenizer: Any, seq2seq: bool) -> Any:
        """The first held-out rows that have a prompt, prepared for generation; None without any."""
        rows = self.held_out.select(range(min(count, len(self.held_out))))
        prompts, _ = prompts_and_targets(rows, self.format, tokenizer=tokenizer)
        kept = [i for i, prompt in enumerate(prompts) if prompt.strip()]
        with no_bars():
            return prepare(rows.select(kept), tokenizer, self.format, seq2seq=seq2seq, for_generation=True) if kept else None


def load_data_of(recipe: Recipe, tokenizer: Any, seq2seq: bool) -> RunData:
    """Load, split and tokenise the recipe's data."""
    section = recipe.data
    with no_bars():
        train, held_out = splits(section, recipe.training.seed)
        options = dict(section.options)
        if section.max_length is not None:
            options["max_length"] = section.max_length
        fmt = get_format(section.format, available=train.column_names, columns=section.columns or None, **options)
        fmt = fmt.bind(train)
        cut: Any = "end" if fmt.name == "chat" else section.truncation

        def tokens(part: Any) -> Any:
            return None if part is None else prepare(part, tokenizer, fmt, truncation=cut, seq2seq=seq2seq)

        return RunData(
            format=fmt, train=train, held_out=held_out, train_rows=tokens(train), held_out_rows=tokens(held_out),
            collator=Seq2SeqCollator(tokenizer) if seq2seq else PacksOrRows(FirstTokenMasked(CausalLMCollator(tokenizer))),
        )  # fmt: skip


@dataclass(frozen=True)
class PacksOrRows:
    """A collator of rows that also takes packs of them (`PackedRows`)."""

    collator: Any

    def __call__(self, rows: Any) -> dict[str, Any]:
        return PackingCollator()(rows) if isinstance(rows[0], list) else self.collator(rows)


def splits(section: DataSection, seed: int) -> tuple[Any, Any]:
    """The rows to train on and the rows to evaluate on (None without any)."""
    data = load_data(section.source, name=section.name)
    train = load_data(section.source, split=section.split, name=section.name)
    trained = section.split.partition("[")[0]
    name = section.eval_split or next((n for n in ("validation", "test") if n in data and n != trained), None)
    if name is not None:
        held_out = load_data(section.source, split=name, name=section.name)
    elif section.holdout:
        if len(train) < 2:
            raise DataError("one row cannot be split into training and held-out data; give data.eval_split or holdout: 0")
        parts = train.train_test_split(test_size=max(1, round(section.holdout * len(train))), seed=seed)
        train, held_out = parts["train"], parts["test"]
    else:
        held_out = None
    return first(train, section.max_examples), first(held_out, section.max_eval_examples)


def first(rows: Any, count: int | None) -> Any:
    return rows if rows is None or count is None or count >= len(rows) else rows.select(range(count))


def attach(recipe: Recipe, model: Any, tokenizer: Any, data: RunData) -> tuple[PeftModel, Recipe]:
    """The base with the recipe's adapter, and the recipe with everything filled in.

    Raises:
        RecipeError: `init_from` together with method options or with another method.
    """
    task = TaskType.SEQ_2_SEQ_LM if getattr(model.config, "is_encoder_decoder", False) else TaskType.CAUSAL_LM
    if recipe.init_from is not None:
        return continued(recipe, model)
    options = method_options(recipe, tokenizer, data, task)
    config = config_type(recipe.method)(task_type=task, **options)
    config.base_model_name_or_path = bundled.stored_as(recipe.base)
    resolved = recipe.model_copy(update={"method_options": options})
    return get_peft_model(model, config), resolved


def continued(recipe: Recipe, model: Any) -> tuple[PeftModel, Recipe]:
    """The base with a saved adapter, to be trained further."""
    config = PeftConfig.from_pretrained(recipe.init_from)  # type: ignore[arg-type]
    if recipe.method_options:
        raise RecipeError(f"init_from={recipe.init_from!r} brings its own configuration; leave method_options out")
    if "method" in recipe.model_fields_set and config.peft_type is not method_type(recipe.method):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise RecipeError(
            f"init_from={recipe.init_from!r} is {kind}, the recipe's method is {recipe.method!r}; leave one out"
        )
    wrapped = PeftModel.from_pretrained(model, recipe.init_from, is_trainable=True)  # type: ignore[arg-type]
    return wrapped, recipe.model_copy(update={"method": config.peft_type.value.lower().replace("_", "-")})  # type: ignore[union-attr]


def method_options(recipe: Recipe, tokenizer: Any, data: RunData, task: TaskType) -> dict[str, Any]:
    """The recipe's method options over the method's recipe defaults, start text and tokenizer filled in."""
    defaults, given = defaults_of(recipe.method), dict(recipe.method_options)
    fields = {f.name for f in dataclasses.fields(config_type(recipe.method))}
    names_a_start = any(k in given for k in INIT_FIELDS)
    options = given if names_a_start else defaults.options | given
    path = str(getattr(tokenizer, "name_or_path", "") or "")
    has_path = os.path.isdir(path)
    possible = task is TaskType.CAUSAL_LM and has_path and not given.get("prefix_projection")
    if defaults.text_init and not names_a_start and possible:
        options = options | defaults.text_init
    uses_text = options.get("init_weights") == "text" or str(options.get("prompt_tuning_init", "")).upper() == "TEXT"
    if not uses_text:
        return options
    text_field = "init_text" if "init_text" in fields else "prompt_tuning_init_text"
    filled = {text_field: start_text(data, tokenizer), "tokenizer_name_or_path": path} | options
    filled["tokenizer_name_or_path"] = bundled.resolve(str(filled["tokenizer_name_or_path"]))
    return filled


def start_text(data: RunData, tokenizer: Any) -> str:
    """A text that shows the task: every class with its frame for labels, else the first training example."""
    classes = getattr(data.format, "classes", None)
    template = getattr(data.format, "template", None)
    if classes and template:
        column = getattr(data.format, "text_column", "")
        used = list(dict.fromkeys(prompts_and_targets(data.train, data.format)[1]))
        return " ".join(template.format(column=column, text="") + name for name in used)
    row = data.train.select(range(1))
    prompts, targets = prompts_and_targets(row, data.format, tokenizer=tokenizer)
    return prompts[0] + targets[0]
