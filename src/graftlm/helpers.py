"""Names that HF PEFT keeps under `peft.helpers`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

from .errors import AdapterError
from .layers import Adapted


@contextmanager
def rescale_adapter_scale(model: Any, multiplier: float) -> Iterator[None]:
    """Within the block every LoRA adapter in a model acts with its scale times `multiplier`.

    Raises:
        TypeError: `multiplier` is no number. AdapterError: there is no LoRA layer.
    """
    if isinstance(multiplier, bool) or not isinstance(multiplier, Real):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    layers = [m for m in model.modules() if isinstance(m, Adapted)]
    found: list[Any] = [(layer, c) for layer in layers for c in layer.changes.values() if "scaling" in c.numbers]
    if not found:
        raise AdapterError("scaling is only supported for models with LoRA layers; this one has none.")
    before = [change.scaling for _, change in found]
    try:
        for (layer, change), scaling in zip(found, before, strict=True):
            change.scaling = scaling * multiplier
            layer.frozen.stale()  # what is merged has the old scale
        yield
    finally:
        for (layer, change), scaling in zip(found, before, strict=True):
            change.scaling = scaling
            layer.frozen.stale()
