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

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..architectures import clean_path as clean_path
from ..architectures import replace_module as replace_module
from ..errors import AdapterError, ConfigError, UnsupportedError
from ..routing import Routes, Switch
from .config import CONFIG_NAME as CONFIG_NAME
from .config import METHODS, PeftConfig
from .config import TASK_HEADS as TASK_HEADS
from .config import PeftType as PeftType
from .config import PromptLearningConfig as PromptLearningConfig
from .config import TaskType as TaskType
from .config import as_enum as as_enum
from .config import config_class as config_class
from .config import get_peft_config as get_peft_config
from .config import register as register


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

    def file_fields(self, host: Site) -> dict[str, Any]:
        """What `adapter_config.json` says otherwise than the configuration, because of what `tensors` holds; then the file
        is the whole adapter, without fields of our own."""
        return {}

    def as_plain(self, host: Site) -> AbstractContextManager:
        """Within the block the adapter is saved without the start values that HF PEFT takes from the base's weights."""
        raise UnsupportedError(
            f"path_initial_model_for_weight_conversion: adapter {self.name!r} has no start values that would be taken out; "
            "its file is what it is converted to already. Leave it out."
        )

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


def method_for(config: PeftConfig, name: str) -> Method:
    """A fresh `Method` for a configuration."""
    for own_config, method in METHODS.values():
        if type(config) is own_config:
            return method(config, name)
    raise ConfigError(
        f"Expected a configuration such as {', '.join(c.__name__ for c, _ in METHODS.values())}; "
        f"got {type(config).__module__}.{type(config).__name__}. Import it from graftlm, not from another library."
    )
