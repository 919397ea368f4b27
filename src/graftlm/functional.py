"""Functions on models with adapters, wrapped or changed in place: HF PEFT's `peft.functional`."""

from .checkpoint import get_peft_model_state_dict, set_peft_model_state_dict
from .injecting import cast_adapter_dtype, delete_adapter, inject_adapter_in_model, set_adapter, set_requires_grad

__all__ = [
    "cast_adapter_dtype",
    "delete_adapter",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
]
