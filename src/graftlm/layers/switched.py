"""Switching adapters at a layer, as libraries do that keep HF PEFT's layers in their models (transformers' `set_adapter`).

Which adapters act is said once for all layers of a model, by its `Switch`; one layer's word is every layer's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from ..routing import Switch


class Switched:
    """What `Adapted` and `ModulesToSaveWrapper` share."""

    switch: Switch

    def held_by(self) -> Iterable[tuple[str, nn.Parameter]]:
        """The adapters' parameters here, each with its adapter's name."""
        raise NotImplementedError

    def _all_available_adapter_names(self) -> list[str]:
        return list(dict.fromkeys(name for name, _ in self.held_by()))

    @property
    def _adapters(self) -> set[str]:
        return set(self._all_available_adapter_names())

    @property
    def active_adapter(self) -> list[str]:
        return list(self.switch.active)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones; here they become trainable (unless `inference_mode`), others frozen."""
        self.switch.active = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        for name, parameter in self.held_by():
            parameter.requires_grad = name in self.switch.active and not inference_mode

    @property
    def disable_adapters(self) -> bool:
        """Whether no adapter acts."""
        return not self.switch.enabled

    def enable_adapters(self, enabled: bool) -> None:
        """Let the active adapters act, or none."""
        self.switch.enabled = enabled
