"""What every adapter method is made of: its configuration, its attached form, and the places where it enters.

A method is one file that defines a `PeftConfig` and a `Method` and registers the pair. The model wrapper (the *host*)
asks the method; it never looks at the method's type. The four entry points and who answers for them:

| entry point              | hook                                                     |
|--------------------------|----------------------------------------------------------|
| input embeddings         | `Method.virtual_tokens(host)` -> [P, H]                  |
| attention memory         | `Method.memory(host)` -> per layer (K, V) [kv_heads, P, head_dim] |
| a linear layer's output  | modules that `attach` puts in place                      |
| a block's output         | forward hooks that `connect` registers                   |
"""

from __future__ import annotations

import dataclasses
import enum
import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..architectures import clean_path as clean_path
from ..architectures import replace_module as replace_module
from ..errors import AdapterError, CheckpointError, ConfigError, nearest
from ..files import find_file, hub_options, parse_json, read_header, read_text
from ..routing import Routes, Switch
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


class Site(Protocol):
    """What a method asks of where it is attached (it calls this the *host*).

    Attributes:
        base: the base model.
        switch: which adapters are active; layers that carry some of them ask it.
        methods: the attached adapters by name.
        base_model: the level above the base; what an adapter's layers share stands there.
        prompt_encoder, bottleneck, adapter_biases: modules of adapters that stand beside the base, by adapter name.
        word_embeddings: the module that makes the base's input embeddings.
        container_types: modules whose inside belongs to adapters.
        adapter_device: where new adapter tensors go.
    """

    switch: Switch
    methods: dict[str, Method]
    prompt_encoder: Any
    bottleneck: Any
    adapter_biases: Any

    @property
    def base(self) -> Any: ...

    @property
    def base_model(self) -> Any: ...

    @property
    def word_embeddings(self) -> nn.Module: ...

    @property
    def container_types(self) -> tuple[type, ...]: ...

    @property
    def adapter_device(self) -> torch.device: ...

    def adapter_dtype(self, layer: Any = None) -> torch.dtype:
        """Dtype of new adapter tensors, beside `layer` if there is one."""
        ...

    def active_now(self) -> tuple[str, ...]:
        """Adapters that apply at this moment."""
        ...

    def routes_now(self) -> Routes | None:
        """Who goes through what, where the batch that runs is mixed."""
        ...

    def without_adapters(self) -> AbstractContextManager[None]:
        """Within the block the base runs without adapters and without gradients."""
        ...


class Method:
    """One adapter as attached to a host. Subclasses implement what their entry points need."""

    #: how base-model paths start in this method's files (HF PEFT has no `.model` level under prompt learning)
    file_prefix: ClassVar[str] = "base_model.model."
    #: whether `merge` can fold the adapter into the base weights
    mergeable: ClassVar[bool] = False
    #: whether it trains copies of modules itself, beside those of `modules_to_save`
    saves: ClassVar[bool] = False

    @property
    def bound(self) -> bool:
        """Whether some of it acts in passes through the wrapper only, not in direct calls of modules of the base."""
        return True

    @property
    def invocation(self) -> list[int] | None:
        """Token ids from whose last occurrence in a row on the adapter acts; None: on all of it."""
        return None

    @property
    def tasks(self) -> int:
        """How many tasks rows can be of, by `task_ids` (see `routing.current_task`); 0 where there is no such thing."""
        return 0

    def __init__(self, config: PeftConfig, name: str) -> None:
        self.config = config
        self.name = name

    def attach(self, host: Site, *, for_loading: bool = False) -> None:
        """Create the adapter's tensors in the host. With `for_loading` initial values do not matter."""
        raise NotImplementedError

    def detach(self, host: Site) -> None:
        """Remove every tensor and module of this adapter from the host."""
        raise NotImplementedError

    def refuse_merge(self, host: Site) -> None:
        """UnsupportedError where this adapter, of a method that can be merged, cannot."""

    def connect(self, host: Site) -> list[Any]:
        """Register forward hooks (block outputs). Called again whenever modules were replaced. Returns the handles."""
        return []

    def named_parameters(self, host: Site) -> Iterator[tuple[str, nn.Parameter]]:
        """The adapter's own parameters with their names in the host's `state_dict`."""
        raise NotImplementedError

    def virtual_tokens(self, host: Site) -> Tensor | None:
        """Virtual tokens [P, H] for the input embeddings, or None."""
        return None

    @property
    def decoder_count(self) -> int:
        """How many virtual tokens enter the decoder of an encoder-decoder model, beside those of its encoder."""
        return 0

    def decoder_tokens(self, host: Site) -> Tensor | None:
        """These tokens [`decoder_count`, H], or None."""
        return None

    def memory(self, host: Site) -> list[tuple[Tensor, Tensor]] | None:
        """Keys and values per decoder layer, each [kv_heads, P, head_dim], or None."""
        return None

    def encoder_memory(self, host: Site) -> list[tuple[Tensor, Tensor]] | None:
        """The same for the encoder's self-attention, or None."""
        return None

    def refuse_beside(self, host: Site, other: Method) -> None:
        """CompositionError where this adapter and another one cannot be active together."""

    def tensors(self, host: Site) -> dict[str, Tensor]:
        """What `adapter_model.safetensors` holds, under HF PEFT's keys."""
        raise NotImplementedError

    def load(self, host: Site, tensors: dict[str, Tensor]) -> None:
        """Fill the attached adapter from such a file's tensors (already checked against `expected_shapes`)."""
        raise NotImplementedError

    def as_written(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors without what HF PEFT writes twice."""
        return tensors

    def saved_place(self, path: str) -> str:
        """How files name a module of the base that this adapter has a trained copy of, by its dotted path."""
        return path

    def completed(self, host: Site, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors, before they are checked, with what another library leaves out."""
        return tensors

    def training_tensors(self, host: Site) -> dict[str, Tensor]:
        """What further training needs beyond `tensors`; empty where the file says it all."""
        return {}

    def load_training(self, host: Site, tensors: dict[str, Tensor]) -> None:
        """Fill the attached adapter from `training_tensors`."""
        raise AdapterError(f"{type(self).__name__} has no training state of its own.")

    def repeated_keys(self, host: Site) -> dict[str, str]:
        """Keys under which HF PEFT's files hold a tensor a second time, and its key here."""
        return {}

    #: whether something happens `after_step`
    scheduled: ClassVar[bool] = False

    @property
    def penalised(self) -> bool:
        """Whether training adds a `penalty` to the loss."""
        return False

    def penalty(self, host: Site) -> Tensor:
        """What is added to the loss of a training pass: a scalar with a gradient."""
        raise NotImplementedError

    def before_steps(self, host: Site, steps: int) -> None:
        """Called before a training of so many steps in all."""

    def after_step(self, host: Site, step: int) -> None:
        """Called after each step of the optimizer, from 0, with the gradients still in place."""

    def expected_shapes(self, host: Site) -> dict[str, torch.Size]:
        """File keys and shapes that `load` needs."""
        return {k: v.shape for k, v in self.tensors(host).items()}


METHODS: dict[PeftType, tuple[type[PeftConfig], type[Method]]] = {}

# Keys of other versions' files that carry no computation of their own.
PASSIVE_KEYS = frozenset(
    {"peft_version", "megatron_core", "megatron_config", "qalora_group_size", "eva_config"}
    | {"corda_config", "ensure_weight_tying", "lora_ga_config", "runtime_config", "layer_replication_version"}
)


def register(peft_type: PeftType, config: type[PeftConfig], method: type[Method]) -> None:
    """Make a method known under its `peft_type`."""
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


def method_for(config: PeftConfig, name: str) -> Method:
    """A fresh `Method` for a configuration."""
    for own_config, method in METHODS.values():
        if type(config) is own_config:
            return method(config, name)
    raise ConfigError(
        f"Expected a configuration such as {', '.join(c.__name__ for c, _ in METHODS.values())}; "
        f"got {type(config).__module__}.{type(config).__name__}. Import it from graftlm, not from another library."
    )


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
