"""HF PEFT's classes by method and by kind of layer.

Here one layer (`layers.Adapted`) carries the changes of all methods, and one level stands between wrapper and base. The
classes below answer `isinstance` by what is attached: `isinstance(module, LoraLayer)` where LoRA changes the module.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..attached import _SETS, AdapterHost
from ..layers import Adapted, ModulesToSaveWrapper
from ..methods import PeftType
from ..methods.lora_change import LoraChange
from ..methods.tokens import TABLE, TokenChange
from ..model import PeftModel

DUMMY_MODEL_CONFIG = {"model_type": "custom"}


class Answering(type):
    """A class that nothing is derived from: `holds(instance)` says what is an instance of it."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return cls.holds(instance)  # type: ignore[attr-defined]

    def __subclasscheck__(cls, other: type) -> bool:
        return cls in getattr(other, "__mro__", ())


# -- the level between wrapper and base ----------------------------------------------------------------------------------
def wrappers_of(instance: Any) -> list[Any]:
    """The wrapper whose `base_model` this is."""
    if type(instance) is not AdapterHost:
        return []
    return [host for host in _SETS.get(instance.model, ()) if host.base_model is instance]


class Tuner(Answering):
    """`LoraModel(model, config, "default")` attaches an adapter, and gives the level below the wrapper."""

    def __call__(cls, model: Any, peft_config: Any, adapter_name: str = "default", **options: Any) -> Any:
        configs = peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}
        first, *others = configs.items()
        wrapper = PeftModel(model, first[1], first[0], **options)
        for name, config in others:
            wrapper.add_adapter(name, config)
        level = wrapper.base_model
        level.__dict__["kept"] = wrapper  # nobody else holds it
        return level


class BaseTuner(metaclass=Tuner):
    """Any method that changes modules of the base."""

    peft_type: ClassVar[PeftType | None] = None
    prefix: ClassVar[str] = ""
    uses_shared_state: ClassVar[bool] = False  # HF PEFT's: whether its adapters cannot be injected without a wrapper

    @staticmethod
    def get_model_config(model: Any) -> dict[str, Any]:
        """A model's configuration as a dictionary; of one that has none, a model type."""
        config: Any = getattr(model, "config", DUMMY_MODEL_CONFIG)
        if hasattr(config, "to_dict"):
            return config.to_dict()
        return dict(config) if isinstance(config, dict) else dataclasses.asdict(config)

    @classmethod
    def holds(cls, instance: Any) -> bool:
        kinds = {config.peft_type for host in wrappers_of(instance) for config in host.peft_config.values()}
        return bool(kinds & TUNERS.keys()) if cls.peft_type is None else cls.peft_type in kinds


class LoraModel(BaseTuner):
    peft_type, prefix = PeftType.LORA, "lora_"


class IA3Model(BaseTuner):
    peft_type, prefix = PeftType.IA3, "ia3_"


class LoHaModel(BaseTuner):
    peft_type, prefix = PeftType.LOHA, "hada_"


class AdaLoraModel(BaseTuner):
    peft_type, prefix = PeftType.ADALORA, "lora_"


class AdaptionPromptModel(BaseTuner):
    peft_type, prefix = PeftType.ADAPTION_PROMPT, "adaption_"


class BOFTModel(BaseTuner):
    peft_type, prefix = PeftType.BOFT, "boft_"


class FourierFTModel(BaseTuner):
    peft_type, prefix = PeftType.FOURIERFT, "fourierft_"


class LNTuningModel(BaseTuner):
    peft_type, prefix = PeftType.LN_TUNING, "ln_tuning_"


class LoKrModel(BaseTuner):
    peft_type, prefix = PeftType.LOKR, "lokr_"


class MissModel(BaseTuner):
    peft_type, prefix = PeftType.MISS, "miss_"


class OFTModel(BaseTuner):
    peft_type, prefix = PeftType.OFT, "oft_"


class RandLoraModel(BaseTuner):
    peft_type, prefix = PeftType.RANDLORA, "randlora_"


class TrainableTokensModel(BaseTuner):
    peft_type, prefix = PeftType.TRAINABLE_TOKENS, "trainable_tokens_"


class VeraModel(BaseTuner):
    peft_type, prefix = PeftType.VERA, "vera_lambda_"


TUNERS: dict[Any, type[BaseTuner]] = {cls.peft_type: cls for cls in BaseTuner.__subclasses__()}


# -- layers --------------------------------------------------------------------------------------------------------------
class BaseTunerLayer(metaclass=Answering):
    """A module that carries adapters of any method that changes layers."""

    @classmethod
    def holds(cls, instance: Any) -> bool:
        return isinstance(instance, Adapted)


class LoraLayer(metaclass=Answering):
    """A module that LoRA changes."""

    kinds: ClassVar[tuple[type, ...]] = (nn.Module,)

    @classmethod
    def holds(cls, instance: Any) -> bool:
        if not isinstance(instance, Adapted) or not any(isinstance(c, LoraChange) for c in instance.changes.values()):
            return False
        return isinstance(instance.frozen.layer, cls.kinds)


class Linear(LoraLayer):
    kinds = (nn.Linear, Conv1D)


class Embedding(LoraLayer):
    kinds = (nn.Embedding,)


class Conv1d(LoraLayer):
    kinds = (nn.Conv1d,)


class Conv2d(LoraLayer):
    kinds = (nn.Conv2d,)


class Conv3d(LoraLayer):
    kinds = (nn.Conv3d,)


class AuxiliaryTrainingWrapper(metaclass=Answering):
    """A module of which an adapter trains a copy."""

    @classmethod
    def holds(cls, instance: Any) -> bool:
        return isinstance(instance, ModulesToSaveWrapper)


class TrainableTokensLayer(metaclass=Answering):
    """A module of which an adapter trains rows of tokens, or follows those of the embeddings."""

    @classmethod
    def holds(cls, instance: Any) -> bool:
        return isinstance(instance, Adapted) and any(isinstance(c, TokenChange) for c in instance.changes.values())


class TrainableTokensWrapper(metaclass=Answering):
    """A module of which an adapter trains rows."""

    @classmethod
    def holds(cls, instance: Any) -> bool:
        return isinstance(instance, Adapted) and TABLE in instance._modules  # not a head whose rows are the embeddings'
