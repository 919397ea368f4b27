"""The error tree: every mistake a user can make raises one of these, with what was got, what was expected and a way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GraftError(Exception):
    """Root of every error that GraftLM raises on purpose."""


class ConfigError(GraftError, ValueError):
    """A configuration value that cannot be used."""


class DataError(GraftError, ValueError):
    """Data that cannot be read, or does not have the expected columns."""


class TargetError(ConfigError):
    """`target_modules` (or a relative of it) that matches nothing usable in the base model."""


class AdapterError(GraftError, ValueError):
    """An unknown, duplicate or incompatible adapter."""


class CompositionError(AdapterError):
    """Adapters that cannot be active together."""


class UnsupportedError(GraftError, NotImplementedError, ValueError):
    """Something that a method or an architecture cannot do. Never ignored silently. (HF PEFT raises ValueError for most.)"""


class KindError(UnsupportedError, TypeError):
    """An adapter, a method or a module of a kind that something cannot be done with. (HF PEFT raises TypeError.)"""


class CheckpointError(GraftError, ValueError, RuntimeError):
    """An adapter directory that cannot be read, or does not fit the model. (HF PEFT, and torch, raise RuntimeError for a
    state that does not.)"""


class BaseMismatchError(CheckpointError):
    """The adapter was trained on another base model."""


class BaseModelError(GraftError, ValueError):
    """A base model that cannot be loaded."""


class DivergedError(GraftError, ArithmeticError):
    """Training whose loss is no finite number."""


class RecipeError(ConfigError):
    """A training recipe with unknown or impossible entries."""


class UnknownAdapterError(AdapterError):
    """A request names an adapter that the server does not have."""


class RequestError(GraftError, ValueError):
    """A request that cannot be served as it is, such as a prompt that is too long."""


class QueueFullError(GraftError, RuntimeError):
    """Too much waits already; the same request may be taken later."""


class ServingError(GraftError, RuntimeError):
    """A request that failed on the server's side, or a server that does not run."""


def nearest(word: str, candidates: Iterable[str], n: int = 3, cutoff: float = 0.5) -> str:
    """A hint such as ``; did you mean 'q_proj'?``, or the empty string where nothing is near."""
    found = difflib.get_close_matches(str(word), [str(c) for c in candidates], n=n, cutoff=cutoff)
    return f"; did you mean {' or '.join(repr(f) for f in found)}?" if found else ""


class PlanError(GraftError, ValueError):
    """A plan that cannot be made: an unknown device, sizes that are none, or a form of the base that is not known."""


class ExhaustedError(GraftError, MemoryError):
    """Memory ran out in a run: what was planned, what was taken, and what to change."""
