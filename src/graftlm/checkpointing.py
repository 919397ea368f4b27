"""Activation checkpointing of a base with adapters: what is computed again must go through the same adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .architectures import base_modules
from .errors import UnsupportedError


def checkpointed_modules(base: nn.Module) -> list[Any]:
    """The modules of a base that can recompute their activations."""
    return [m for _, m in base_modules(base) if hasattr(m, "gradient_checkpointing")]


def keep_passes(modules: list[Any], has_memory: bool, keep: Callable[[Callable], Callable]) -> None:
    """Let those of the modules that recompute do so as in their forward pass: `keep` wraps what calls them again.

    Raises:
        UnsupportedError: reentrant checkpointing where attention has a memory of adapters.
    """
    for module in modules:
        function = getattr(module, "_gradient_checkpointing_func", None)
        if not (module.gradient_checkpointing and function is not None):
            continue
        if has_memory and getattr(function, "keywords", {}).get("use_reentrant"):
            raise UnsupportedError(
                "Prefix Tuning needs non-reentrant activation checkpointing: "
                "gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        module._gradient_checkpointing_func = keep(function)


def enable_checkpointing(base: Any, kind: str, given: dict | None, others: dict[str, Any]) -> None:
    """Switch it on in a base by its `<kind>_checkpointing_enable`; `every_n_layers` may stand among the `given` options."""
    options = dict(given or {})
    if "every_n_layers" in options:
        others = others | {"every_n_layers": options.pop("every_n_layers")}
    if options.get("use_reentrant"):
        base.enable_input_require_grads()
    try:
        getattr(base, f"{kind}_checkpointing_enable")(options or None, **others)
    except TypeError as error:
        if "every_n_layers" not in others:
            raise
        raise UnsupportedError(
            f"every_n_layers={others['every_n_layers']}: this version of transformers, or this model, recomputes every "
            f"layer or none ({error}). Leave it out."
        ) from error
