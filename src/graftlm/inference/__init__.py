"""Running a base model with adapters on text."""

from .text import Sampling, complete

__all__ = ["Sampling", "complete"]
