"""Training and evaluation mode, for a while."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(*models: nn.Module, but: Container[nn.Module] = ()) -> Iterator[None]:
    """Within the block the models are in evaluation mode; after it every module has its own mode again, whatever happened.

    Args:
        but: modules whose mode stays as it is (quantised layers, which would be packed in evaluation).
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        for module, mode in modes:
            if mode and module in but:
                module.training = True
        yield
    finally:
        for module, mode in modes:
            if module.training is not mode:  # setting is slow
                module.training = mode
