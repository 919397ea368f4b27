"""How a wrapper passes for the model that it wraps: the base's own signature, and its answers to what it has none for."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Container
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from . import naming
from .quantization import settle

_CLASSES: dict[tuple[Any, Any, bool, str], Any] = {}
_NAMES = {  # HF PEFT's, which transformers' pipelines know
    "CAUSAL_LM": "PeftModelForCausalLM",
    "FEATURE_EXTRACTION": "PeftModelForFeatureExtraction",
    "QUESTION_ANS": "PeftModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "PeftModelForSeq2SeqLM",
    "SEQ_CLS": "PeftModelForSequenceClassification",
    "TOKEN_CLS": "PeftModelForTokenClassification",
}


def class_over(cls: Any, base: Any, plain: bool = False, task: Any = None) -> Any:
    """The wrapper class `cls` with the base's own forward signature, which a Trainer reads to keep a data set's columns.
    `task`, of the first adapter, gives it its name.

    Over a `plain` base, any torch module, it is moved, cast and switched to training as torch does it: transformers looks
    for what its own models have.
    """
    name = _NAMES.get(task, "PeftModel")
    if (cls, base, plain, name) in _CLASSES:
        return _CLASSES[cls, base, plain, name]
    signature = inspect.signature(base.forward)
    names = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    rest = [p for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    by_row = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in ("adapter_names", "task_ids")]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward with the active adapters; `adapter_names` chooses others for this call."""
        return self._run(*args, **kwargs)

    forward.__signature__ = signature.replace(parameters=[*names, *by_row, *rest])  # type: ignore[attr-defined]
    own = {n: f for n, f in vars(nn.Module).items() if getattr(cls, n) is vars(PreTrainedModel).get(n)} if plain else {}
    body = own | {"forward": forward, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return _CLASSES.setdefault((cls, base, plain, name), type(name, (cls,), body))


def rebuild(cls: Any, base: type, state: bytes, plain: bool, task: Any = None) -> Any:
    """A wrapper out of its pickle."""
    made = object.__new__(class_over(cls, base, plain, task))
    made.__dict__.update(pickle.loads(state))
    settle(made.base)
    made._connect()
    return made


def answer_by_base(wrapper: Any, kind: type, taken: Container[str]) -> None:
    """Everything that a `kind` would answer by itself is asked of the base instead, except what is `taken`."""
    for name in dir(kind):
        if name not in taken and not (name.startswith("__") and name.endswith("__")):
            setattr(wrapper, name, _answered_by_base(name))


def _answered_by_base(name: str) -> property:
    def get(self: Any) -> Any:
        return getattr(self.base, name)

    def put(self: Any, value: Any) -> None:
        setattr(self.base, name, value)

    return property(get, put)


def skips_a_level(wrapper: Any) -> bool:
    """Whether `wrapper.model` is the base and not the base's backbone: so it is under HF PEFT's name, whose level between
    wrapper and base answers first where a method changes layers."""
    first = next(iter(wrapper.methods.values()), None)
    return naming.under_peft and not (first is not None and first.config.is_prompt_learning)


def reads_backbone(forward: Any) -> bool:
    """Whether this is what TRL's trainers put in the place of a model's forward: it calls `self.base_model`, which it takes
    for the backbone, and multiplies by the head itself."""
    made = getattr(forward, "__func__", None)
    return isinstance(made, FunctionType) and str(made.__globals__.get("__name__")).startswith("trl.")


def moved_to_base(wrapper: Any, forward: Any) -> MethodType:
    """Such a forward as the base's, where `self.base_model` is the backbone, adapters in it; the wrapper then runs it as
    it runs any base. What it calls as the wrapper's own forward becomes the base's."""
    made, base = forward.__func__, wrapper.base
    cells = [CellType(base.forward) if c.cell_contents == wrapper.forward else c for c in made.__closure__ or ()]
    moved = FunctionType(made.__code__, made.__globals__, made.__name__, made.__defaults__, tuple(cells))
    moved.__kwdefaults__ = made.__kwdefaults__
    moved.__wrapped__ = type(base).forward  # type: ignore[attr-defined]
    return MethodType(moved, base)
