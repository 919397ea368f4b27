"""HF PEFT's tables by method and by task, as views of what is registered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..errors import ConfigError
from ..methods import METHODS, Method, PeftConfig
from ..methods.base import register
from .tasks import BY_TASK
from .tuners import TUNERS


class View(Mapping):
    """What `pick(peft_type)` gives for each registered method; None leaves it out."""

    def __init__(self, pick: Callable[[Any], Any]) -> None:
        self.pick = pick

    def __getitem__(self, key: Any) -> Any:
        found = self.pick(key) if key in METHODS else None
        if found is None:
            raise KeyError(key)
        return found

    def __iter__(self) -> Iterator[Any]:
        return (key for key in METHODS if self.pick(key) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))


def prefix_of(peft_type: Any) -> str | None:
    """How the names of a method's parameters start in HF PEFT (`lora_`)."""
    return None if peft_type not in TUNERS else TUNERS[peft_type].prefix


PEFT_TYPE_TO_CONFIG_MAPPING = View(lambda peft_type: METHODS[peft_type][0])
PEFT_TYPE_TO_TUNER_MAPPING = View(lambda peft_type: TUNERS.get(peft_type))
PEFT_TYPE_TO_MIXED_MODEL_MAPPING = PEFT_TYPE_TO_TUNER_MAPPING  # here every method mixes with every other
PEFT_TYPE_TO_PREFIX_MAPPING = View(prefix_of)
MODEL_TYPE_TO_PEFT_MODEL_MAPPING = {task.value: cls for task, cls in BY_TASK.items() if task is not None}


def register_peft_method(
    *, name: str, config_cls: Any, model_cls: Any, prefix: str | None = None, is_mixed_compatible: bool = False
) -> None:
    """Make a method of one's own known under `name`, as `get_peft_model` and files ask for it.

    Args:
        name: lower case; `peft_type` in files is its upper case.
        config_cls: a `PeftConfig`; its `peft_type` is set by this name.
        model_cls: a `graftlm.methods.Method` (docs/architecture.md shows one), which is what a method is here; HF PEFT's is
            a `BaseTuner`.
        prefix, is_mixed_compatible: HF PEFT's. A method names its parameters itself, and all methods mix.
    """
    if not name.islower() or name.endswith("_"):
        raise ConfigError(f"name={name!r}: expected lower case letters without '_' at the end.")
    key: Any = name.upper()
    if key in METHODS:
        raise ConfigError(f"There is a method {name!r} already; choose another name.")
    if not (isinstance(config_cls, type) and issubclass(config_cls, PeftConfig)):
        raise ConfigError(f"config_cls={config_cls!r}: expected a subclass of graftlm.PeftConfig.")
    if not (isinstance(model_cls, type) and issubclass(model_cls, Method)):
        raise ConfigError(
            f"model_cls={model_cls!r}: expected a subclass of graftlm.methods.Method (see 'Adding a method' in "
            "docs/architecture.md); HF PEFT's tuner classes do not run here."
        )
    register(key, config_cls, model_cls)
