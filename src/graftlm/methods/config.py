"""A method's configuration: the fields that all share, what `adapter_config.json` says, and the registry of methods."""

from __future__ import annotations

import dataclasses
import enum
import json
import os
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import CheckpointError, ConfigError, nearest
from ..files import find_file, hub_options, parse_json, read_header, read_text
from ..version import PEFT_VERSION
from .fields import Count, check_fields

CONFIG_NAME = "adapter_config.json"


class PeftType(str, enum.Enum):
    """Names of methods, as they stand in `adapter_config.json`; those that are here are registered in `METHODS`."""

    LORA = "LORA"
    PROMPT_TUNING = "PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    BOTTLENECK = "BOTTLENECK"
    IA3 = "IA3"
    LOHA = "LOHA"
    ADALORA = "ADALORA"
    VERA = "VERA"
    LOKR = "LOKR"
    OFT = "OFT"
    BOFT = "BOFT"
    MISS = "MISS"
    LN_TUNING = "LN_TUNING"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    RANDLORA = "RANDLORA"
    FOURIERFT = "FOURIERFT"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    CPT = "CPT"
    CARTRIDGE = "CARTRIDGE"


class TaskType(str, enum.Enum):
    """What the wrapped model computes; it decides about labels, heads that are trained along, and prefix placement."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


# The head that a task trains in full beside the adapter, by HF PEFT's convention.
TASK_HEADS = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}


@dataclass(kw_only=True)
class PeftConfig:
    """Fields that all methods share. Files: `adapter_config.json`, HF PEFT's names.

    Args:
        task_type: a `TaskType`, or None for a bare model.
        base_model_name_or_path: where the base comes from; filled in from the model when None.
        revision: the base's revision on the hub.
        inference_mode: True for an adapter that is loaded for use only (its tensors are frozen).
    """

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    # The version of HF PEFT whose files these are; written into them.
    peft_version: ClassVar[str] = PEFT_VERSION
    # Fields of ours that HF PEFT does not know. They travel in the weights file's header, so that HF PEFT loads the rest.
    own_fields: ClassVar[frozenset[str]] = frozenset()
    # A method's fields that say nothing about what an attached adapter computes, beside those of `checkpoint`.
    neutral_fields: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        check_fields(self)
        if self.task_type is not None:
            self.task_type = as_enum(TaskType, self.task_type, "task_type")

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method trains virtual tokens or a prefix instead of changing layers."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether the method is LLaMA-Adapter; HF PEFT asks this of every configuration."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return {f.name: as_json(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def save_pretrained(
        self, save_directory: str | os.PathLike, auto_mapping_dict: dict | None = None, **overrides: Any
    ) -> None:
        """Write `adapter_config.json` into `save_directory`, with other values of some fields where given. Fields of our own
        are left to the weights file's header.

        Raises:
            ConfigError: `overrides` names no field.
        """
        fields = self.to_dict()
        for key in overrides.keys() - fields.keys():
            raise ConfigError(f"{type(self).__name__} has no field {key!r} to save{nearest(key, fields)}.")
        if auto_mapping_dict is not None:
            overrides["auto_mapping"] = auto_mapping_dict
        os.makedirs(save_directory, exist_ok=True)
        values = {k: v for k, v in fields.items() if k not in self.own_fields} | {"peft_version": PEFT_VERSION} | overrides
        path = os.path.join(save_directory, CONFIG_NAME)
        with open(path + ".tmp", "w", encoding="utf-8") as f:
            json.dump(values, f, indent=2, sort_keys=True, ensure_ascii=False)
        os.replace(path + ".tmp", path)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "the configuration") -> PeftConfig:
        """Build the configuration of the method that `values["peft_type"]` names.

        Keys that this version does not know are refused when they are switched on (they would change the result), and
        passed over when they are off.

        Raises:
            CheckpointError: unknown method, or an unknown option that is on.
        """
        values = dict(values)
        target = config_class(values.pop("peft_type", None) or cls._own_type(), where)
        names = {f.name for f in dataclasses.fields(target)}
        unknown = {k: v for k, v in values.items() if k not in names}
        active = sorted(k for k, v in unknown.items() if k not in PASSIVE_KEYS and v not in (None, False, 0, "", [], {}))
        if active:
            raise CheckpointError(
                f"{where} switches on options that GraftLM does not have for {target.__name__}: "
                + ", ".join(f"{k}={unknown[k]!r}" for k in active)
                + ". Ignoring them would change the adapter's output. Train or convert the adapter without them"
                + nearest(active[0], names)
            )
        return target(**{k: v for k, v in values.items() if k in names})

    @classmethod
    def _own_type(cls) -> PeftType | None:
        return next((t for t, (config, _) in METHODS.items() if config is cls), None)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> PeftConfig:
        """Read the configuration of an adapter from a directory (or a hub id); the class follows from its `peft_type`.

        Keyword arguments that are fields of the configuration override what the file says; `revision`, `cache_dir`,
        `token`, `subfolder` and `local_files_only` select a hub file.
        """
        hub = hub_options(kwargs)
        path = find_file(pretrained_model_name_or_path, CONFIG_NAME, **hub)
        values = parse_json(read_text(path, CheckpointError), str(path), CheckpointError)
        if not isinstance(values, dict):
            raise CheckpointError(f"{path} holds a {type(values).__name__}, expected an object. Save the adapter again.")
        values |= read_header(pretrained_model_name_or_path, **hub).get("config", {})
        return cls.from_dict(values | kwargs, where=str(path))

    @staticmethod
    def from_json_file(path_json_file: str | os.PathLike, **kwargs: Any) -> dict[str, Any]:
        """The fields in a file, as they stand there (`from_pretrained` checks them and makes a configuration)."""
        values = parse_json(read_text(path_json_file, CheckpointError), str(path_json_file), CheckpointError)
        values.pop("runtime_config", None)
        return values

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """Build the configuration of the class that `peft_type` names (HF PEFT's constructor)."""
        return cls.from_dict(kwargs)


@dataclass(kw_only=True)
class PromptLearningConfig(PeftConfig):
    """Fields of the methods with virtual tokens. Those left None are read from the base model when attached.

    Args:
        num_virtual_tokens: how many virtual tokens (P).
        token_dim: width of a virtual token: that of the input embeddings; for a prefix, kv_heads * head_dim.
        num_transformer_submodules: 2 on encoder-decoder models (HF PEFT's layout of the table), else 1.
        num_attention_heads, num_layers: the base's; a prefix's file is laid out by them.
        modules_to_save: modules of the base that are trained in full and saved along.
    """

    num_virtual_tokens: Count = 20
    token_dim: Count | None = None
    num_transformer_submodules: Count | None = None
    num_attention_heads: Count | None = None
    num_layers: Count | None = None
    modules_to_save: list[str] | None = None

    @property
    def is_prompt_learning(self) -> bool:
        return True


METHODS: dict[PeftType, tuple[type[PeftConfig], type[Any]]] = {}  # each with its `Method`

# Keys of other versions' files that carry no computation of their own.
PASSIVE_KEYS = frozenset(
    {"peft_version", "megatron_core", "megatron_config", "qalora_group_size", "eva_config"}
    | {"corda_config", "ensure_weight_tying", "lora_ga_config", "runtime_config", "layer_replication_version"}
)


def register(peft_type: PeftType, config: type[PeftConfig], method: type[Any]) -> None:
    """Make a method, a configuration and a `base.Method`, known under its `peft_type`."""
    METHODS[peft_type] = (config, method)


def config_class(peft_type: Any, where: str) -> type[PeftConfig]:
    """The configuration class of a `peft_type`; CheckpointError for one that GraftLM does not have."""
    try:
        return METHODS[PeftType(peft_type)][0]
    except (ValueError, KeyError):
        known = [t.value for t in METHODS]
        raise CheckpointError(
            f"{where}: peft_type {peft_type!r} is not a method of GraftLM; it has {', '.join(known)}"
            + nearest(str(peft_type), known)
        ) from None


def as_enum(kind: type[enum.Enum], value: Any, name: str) -> Any:
    """`value` as a member of `kind`, by value or (any case) name; ConfigError otherwise."""
    if isinstance(value, kind):
        return value
    text = str(getattr(value, "value", value))
    for member in kind:
        if text == member.value or text.upper() == member.name:
            return member
    names = [m.value for m in kind]
    raise ConfigError(f"{name}={value!r}: expected one of {', '.join(map(str, names))}" + nearest(text, names))


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """The configuration that a dictionary with `peft_type` describes."""
    return PeftConfig.from_dict(config_dict)


def as_json(value: Any) -> Any:
    """Plain JSON value of a configuration field."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(as_json(v) for v in value)
    if isinstance(value, (list, tuple)):
        return [as_json(v) for v in value]
    if isinstance(value, dict):
        return {k: as_json(v) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return as_json(dataclasses.asdict(value))
    return value
