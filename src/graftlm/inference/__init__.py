"""Running a base model with adapters on text: prompts in, completions out; and the engine of a server."""

from .text import Sampling, complete

__all__ = ["Sampling", "complete"]
