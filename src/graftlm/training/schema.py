"""The recipe: one YAML file that says everything about a training run. All defaults stand here and in `defaults`.

base: graftlm-base            # the bundled model, a local path or a hub id
quantization: nf4             # int8, nf4, fp4; left out: not quantised
method: lora                  # prompt-tuning, prefix-tuning, bottleneck, … (see `defaults`)
method_options: {r: 8}        # fields of the method's configuration
data: {source: tweets}
training: {epochs: 10}
output_dir: my-adapter
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ..errors import ConfigError, GraftError, RecipeError, nearest
from ..files import read_text
from .bases import scheme_name
from .defaults import (
    HIDDEN_FIELDS,
    LAYERS,
    QUANTIZED,
    batch_size_for,
    config_type,
    defaults_of,
    epochs_for,
    methods_in_words,
    plain_name,
)


def seconds_of(value: Any) -> Any:
    """Seconds of "90s", "10m", "1.5h" or "90"; anything else as it is."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", value) if isinstance(value, str) else None
    return value if found is None else float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


Cut = Literal["end", "prompt"]
# YAML reads a bare `no` as false.
Strategy = Annotated[Literal["no", "steps", "epoch"], BeforeValidator(lambda v: "no" if v is False else v)]
Layers = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Seconds = Annotated[float, BeforeValidator(seconds_of), Field(gt=0)]
Scheme = Annotated[Literal["int8", "nf4", "fp4"] | None, BeforeValidator(scheme_name)]


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused, values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSection(Section):
    """Where the examples come from and how they become text."""

    source: str = Field(default="tweets", description="bundled name, file, folder or hub id")
    name: str | None = Field(default=None, description="configuration of a hub data set")
    format: str | None = Field(default=None, description="how an example becomes text; guessed from the columns")
    columns: dict[str, str] = Field(default_factory=dict, description="{role: column name}")
    options: dict[str, Any] = Field(default_factory=dict, description="other fields of the format")
    split: str = Field(default="train", description="split or slice to train on, e.g. train[:80%]")
    eval_split: str | None = Field(default=None, description="split to evaluate on; validation or test where there is one")
    holdout: float = Field(default=0.1, ge=0, lt=1, description="share of `split` held out otherwise; 0 for none")
    max_length: int | None = Field(default=None, ge=1, description="longest example, in tokens; the format's own")
    truncation: Cut = Field(default="prompt", description="what is cut from longer examples")
    max_examples: int | None = Field(default=None, ge=1, description="train on at most so many")
    max_eval_examples: int | None = Field(default=None, ge=1, description="evaluate on at most so many")


class TrainingSection(Section):
    """How the adapter is trained (on `transformers.Trainer`)."""

    epochs: Positive | None = Field(default=None, description="passes over the data; by their number of rows, 3 to 10")
    max_steps: int | None = Field(default=None, ge=1, description="optimizer steps; overrides epochs")
    batch_size: Layers | None = Field(default=None, description="rows a step and device; by their number, 2 to 8")
    eval_batch_size: int = Field(default=32, ge=1, description="rows a batch in evaluation")
    accumulation: int = Field(default=1, ge=1, description="steps that make one update")
    packing: bool = Field(default=False, description="fill steps by tokens instead of rows; batch_size is not used then")
    tokens: int = Field(default=1024, ge=16, description="most tokens a step, with packing")
    learning_rate: Positive | Literal["search"] | None = Field(
        default=None, description="a number, `search`, or left out: by method and width of the base"
    )
    budget: Seconds = Field(default=120.0, description="time of a search, in seconds or as 90s, 10m, 1h")
    schedule: str = Field(default="linear", description="transformers' name of the learning-rate schedule")
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1, description="share of the steps")
    weight_decay: float = Field(default=0.0, ge=0, description="of AdamW")
    max_grad_norm: float = Field(default=1.0, ge=0, description="gradients are clipped to this norm; 0 for never")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="share of the target spread over the vocabulary")
    seed: int = Field(default=42, ge=0, description="of everything random")
    eval_strategy: Strategy = Field(default="epoch", description="when to evaluate")
    save_strategy: Strategy = Field(default="epoch", description="when to save checkpoints")
    interval: int = Field(default=50, ge=1, description="steps, for the strategy `steps`")
    logging_steps: int = Field(default=10, ge=1, description="steps between log entries")
    keep_checkpoints: int = Field(default=2, ge=1, description="checkpoints that are kept (the best is always)")
    load_best: bool = Field(default=True, description="end with the best checkpoint by held-out loss")
    early_stopping: int | None = Field(default=None, ge=1, description="stop after so many evaluations without gain")
    gradient_checkpointing: bool | Layers = Field(
        default=False, description="recompute activations to save memory; a number n: those of each n-th layer"
    )
    prepacked: bool = Field(default=False, description="CPU: two more copies of frozen weights, as it multiplies fastest")
    torch_compile: bool = Field(default=False, description="compile the base's layers, if a trial on the first rows pays")
    strategy: Literal["ddp", "fsdp2", "zero2", "zero3"] = Field(
        default="ddp",
        description="several processes: each holds all (ddp), part of the base (fsdp2), of AdamW (zero2) or of both (zero3)",
    )
    shard_adapters: bool = Field(default=False, description="fsdp2: each process holds a part of the adapter, too")
    threads: int | None = Field(default=None, ge=1, description="CPU threads of torch")
    report_to: list[str] = Field(default_factory=list, description="trackers of transformers, e.g. tensorboard")


class Recipe(Section):
    """A whole run. Build it from YAML (`from_yaml`) or a dict (`from_dict`); both collect every error in one RecipeError."""

    base: str = Field(
        default="graftlm-base", description="base model: graftlm-base (bundled), smollm2, a path, a GGUF file or a hub id"
    )
    quantization: Scheme = Field(default=None, description="int8, nf4 or fp4: how the base is quantised while it is loaded")
    task: Literal["auto", "causal-lm", "seq2seq"] = Field(default="auto", description="kind of model; by its configuration")
    method: str = Field(
        default="lora",
        description=methods_in_words(),
    )
    method_options: dict[str, Any] = Field(default_factory=dict, description="fields of the method's configuration")
    init_from: str | None = Field(default=None, description="adapter directory to train further")
    data: DataSection = Field(default=DataSection(), description="the examples")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="bf16 where the machine has it and the base is large, else fp32; fp16 for GPUs only"
    )
    training: TrainingSection = Field(default=TrainingSection(), description="how to train")
    output_dir: str = Field(default="graftlm-out", description="where the adapter goes")
    overwrite: bool = Field(default=False, description="replace an earlier run in output_dir")
    resume: bool = Field(default=False, description="go on from the last complete checkpoint in output_dir")

    def filled(self, width: int, rows: int, layers: int = LAYERS) -> Recipe:
        """The recipe with learning rate, epochs and batch size in numbers, where it leaves them out.

        Args:
            width: hidden size of the base.
            rows: to train on.
            layers: of the base.
        """
        t = self.training
        batch = t.batch_size or batch_size_for(rows)
        filled: dict[str, Any] = {"batch_size": batch, "epochs": t.epochs or epochs_for(rows, batch * t.accumulation)}
        if t.learning_rate is None:
            filled["learning_rate"] = defaults_of(self.method).rate(width, layers)
        return self.model_copy(update={"training": t.model_copy(update=filled)})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], overrides: Iterable[str] = (), where: str = "recipe") -> Recipe:
        """A checked recipe; `overrides` are `key.key=value` texts, their values YAML.

        Raises:
            RecipeError: lists every unknown key (with the nearest name) and every impossible value.
        """
        content: dict[str, Any] = plain_copy(dict(values))
        problems = [*apply_overrides(content, overrides), *spell_out(content)]
        made = None
        try:
            made = cls.model_validate(content)
        except ValidationError as error:
            problems += described(cls, error.errors())
        problems += method_problems(content.get("method", cls.model_fields["method"].default), content.get("method_options"))
        if made is not None:
            problems += made.conflicts()
        if problems or made is None:
            raise RecipeError(f"{where}: {len(problems)} problem(s)\n" + "\n".join(f"  {p}" for p in problems))
        return made

    @classmethod
    def from_yaml(cls, path: str | os.PathLike, overrides: Iterable[str] = ()) -> Recipe:
        """Read a recipe file; errors as in `from_dict`."""
        return cls.from_dict(read_yaml(path, RecipeError, "recipe"), overrides, str(path))

    def to_yaml(self) -> str:
        """The whole recipe, defaults included."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)

    def replace(self, *overrides: str, **values: Any) -> Recipe:
        """A changed copy, checked anew: `recipe.replace("training.epochs=3", method="p-tuning")`."""
        return type(self).from_dict(self.model_dump() | values, overrides)

    def conflicts(self) -> list[str]:
        """Entries that do not go together."""
        training, found = self.training, []
        if self.overwrite and self.resume:
            found.append("overwrite and resume: choose one; resume needs the run that overwrite would delete")
        if training.early_stopping and not (training.eval_strategy == training.save_strategy != "no"):
            found.append("training.early_stopping needs equal eval_strategy and save_strategy, epoch or steps")
        if training.strategy in ("fsdp2", "zero3"):
            others = {"prepacked": training.prepacked, "torch_compile": training.torch_compile}
            found += [
                f"training.{name} and strategy {training.strategy}: it is for a base that every process holds; leave one out"
                for name, wanted in others.items()
                if wanted
            ]
        if training.strategy != "fsdp2" and training.shard_adapters:
            found.append(f"training.shard_adapters and strategy {training.strategy}: it is of strategy fsdp2")
        from transformers import SchedulerType

        names = [s.value for s in SchedulerType]
        if training.schedule not in names:
            found.append(f"training.schedule: {training.schedule!r} is unknown{nearest(training.schedule, names)}")
        return found


def plain_copy(values: Any) -> Any:
    return {k: plain_copy(v) for k, v in values.items()} if isinstance(values, dict) else values


class Loader(yaml.SafeLoader):
    """YAML's safe loader that also reads `1e-3` as a number, and refuses a key twice in one mapping."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line, name = key.start_mark.line + 1, (key.tag, key.value)
            if name in lines:
                raise yaml.YAMLError(
                    f"line {line}: the key {key.value!r} stands in line {lines[name]} already; keep one of them"
                )
            lines[name] = line
        return node


NUMBER = re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$")
Loader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))


def load_yaml(text: str) -> Any:
    return yaml.load(text, Loader)  # noqa: S506  (a SafeLoader)


def read_yaml(path: str | os.PathLike, wrong: type[GraftError], what: str) -> dict[str, Any]:
    """Keys and values of a file; `wrong` where it cannot be read, is no YAML, or holds something else."""
    try:
        values = load_yaml(read_text(path, wrong))
    except OSError as error:
        raise wrong(f"cannot read the {what} {str(path)!r}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise wrong(f"{path} is not valid YAML: {error}") from error
    if values is not None and not isinstance(values, dict):
        raise wrong(f"{path}: expected keys and values at the top level, got {type(values).__name__}")
    return values or {}


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> list[str]:
    """Put `a.b=value` texts into nested values; returns what could not be read."""
    problems = []
    for text in overrides:
        key, sign, value = text.partition("=")
        if not sign or not key.strip():
            problems.append(f"{text!r}: expected key=value, for example training.epochs=3")
            continue
        try:
            read = load_yaml(value)
        except yaml.YAMLError as error:
            problems.append(f"{text!r}: the value is not valid YAML: {error}")
            continue
        *parents, last = key.strip().split(".")
        place = values
        for parent in parents:
            inner = place.setdefault(parent, {})
            if not isinstance(inner, dict):
                inner = place[parent] = {}
            place = inner
        place[last] = read
    return problems


def spell_out(values: dict[str, Any]) -> list[str]:
    """Put method and quantisation in the place of a name that says both (`qlora`); returns what contradicts it."""
    name = values.get("method")
    if plain_name(name) not in QUANTIZED:
        return []
    values["method"], means = QUANTIZED[plain_name(name)]
    said = scheme_name(values.get("quantization"))
    values["quantization"] = means
    if said in (None, means):
        return []
    return [f"method: {name} is {values['method']} with quantization: {means}, and the recipe says {said}; leave one out"]


# what pydantic puts into the path for a part of a union
KINDS = re.compile(r"(constrained-|literal\[|function-|nullable|list\[|dict\[).*|int|float|bool|str|none")


def described(model: type[BaseModel], errors: Sequence[Any]) -> list[str]:
    """pydantic's errors, a line for each entry: what may be of several kinds has an error of each."""
    found: dict[str, list[str]] = {}
    for item in errors:
        path = [str(part) for part in item["loc"]]
        name = ".".join(path if item["type"] == "extra_forbidden" else [p for p in path if not KINDS.fullmatch(p)])
        found.setdefault(name, []).append(describe(model, path, item))
    return [f"{name}: {'; or '.join(texts)}" for name, texts in found.items()]


def describe(model: type[BaseModel], path: list[str], item: Any) -> str:
    """A pydantic error at a path, with the nearest key for an unknown one."""
    if item["type"] == "extra_forbidden":
        known = fields_at(model, path[:-1])
        return "unknown key" + (elsewhere(model, path[-1]) or nearest(path[-1], known) or "; known: " + ", ".join(known))
    if item["type"] == "literal_error":
        hint = nearest(str(item["input"]), re.findall(r"'([^']+)'", item["ctx"]["expected"]))
        return f"expected {item['ctx']['expected']}, got {item['input']!r}{hint}"
    if item["type"] == "model_type":
        return f"expected keys and values, got {item.get('input')!r}"
    return f"{item['msg'][0].lower()}{item['msg'][1:]} (got {item.get('input')!r})"


def fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """Names of the fields of the section at `path`."""
    for part in path:
        inner = model.model_fields[part].annotation
        model = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else Section
    return list(model.model_fields)


def elsewhere(model: type[BaseModel], key: str) -> str:
    """A hint for a key that stands in the wrong section."""
    places = {"": model, **{f"{name}.": Recipe.model_fields[name].annotation for name in ("data", "training")}}
    found = next((place for place, section in places.items() if key in getattr(section, "model_fields", ())), None)
    return "" if found is None else f"; did you mean '{found}{key}'?"


def method_problems(method: Any, options: Any) -> list[str]:
    """What is wrong with a method's name and options."""
    try:
        kind = config_type(method)
    except ConfigError as error:
        return [f"method: {error}"]
    if not isinstance(options, dict):
        return []
    known = [f.name for f in dataclasses.fields(kind) if f.name not in HIDDEN_FIELDS]
    unknown = [k for k in options if k not in known]
    problems = [
        f"method_options.{k}: {kind.__name__} has no such field{nearest(str(k), known) or '; it has ' + ', '.join(known)}"
        for k in unknown
    ]
    try:
        checked = {k: v for k, v in options.items() if k in known}
        later = {
            k: "filled in by the run"
            for k in ("tokenizer_name_or_path", "init_text", "prompt_tuning_init_text")
            if k in known
        }
        kind(**later | checked)
    except (ConfigError, TypeError) as error:
        problems.append(f"method_options: {error}")
    return problems
