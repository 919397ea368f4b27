"""The level between a set of adapters and its base."""

from __future__ import annotations

from typing import Any

from torch import nn


class AdapterHost(nn.Module):
    """The level between wrapper and base, so that modules are found under `base_model.model.…` as with HF PEFT."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)
