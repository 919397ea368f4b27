"""The base of a comparison in memory: in one form, or in several where methods are compared over quantised bases."""

from __future__ import annotations

import gc
import io
from collections.abc import Collection
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import BaseMismatchError, ConfigError, GraftError
from ..quantization import scheme_of

if TYPE_CHECKING:
    from ..training import Evaluation, Recipe
    from ..training.setup import RunData
    from .general import General
    from .result import ComparisonResult


@dataclass(frozen=True)
class Base:
    """A loaded base; `shape` is its structure before any run, `given` whether the caller loaded it."""

    model: Any
    tokenizer: Any
    shape: list[tuple[str, str, int, int]]
    given: bool = False

    @property
    def parameters(self) -> int:
        """Elements of the base, packed ones too."""
        return self.model.num_parameters()


class Bases:
    """The bases by scheme (None: as the base was given or saved), each loaded when it is first asked for.

    Args:
        name: the base's name.
        dtype: a recipe's dtype.
        model, tokenizer: the base, loaded by the caller, for the scheme None.
    """

    def __init__(self, name: str, dtype: str, model: Any = None, tokenizer: Any = None) -> None:
        self.name, self.dtype = name, dtype
        self.held: dict[str | None, Base] = {}
        self.measured: dict[tuple[str | None, int], Evaluation | None] = {}
        self.given = made(model, tokenizer, True) if model is not None and tokenizer is not None else None
        if self.given:
            self.held[None] = self.given
        self.main: str | None = None
        self.data: dict[tuple[str, int], RunData] = {}
        self.general: dict[str | None, float | None] = {}

    def get(self, scheme: str | None) -> Base:
        """The base in a scheme.

        Raises:
            GraftError: it cannot be loaded; or it is another base than the one that was given.
        """
        if scheme not in self.held:
            self.held[scheme] = self.load(scheme)
        return self.held[scheme]

    def load(self, scheme: str | None) -> Base:
        from .. import fingerprint, training

        form = f"in {scheme}" if scheme else "loaded anew"
        try:
            found = made(*training.resolve_base(self.name, dtype=self.dtype, quantization=scheme))
            with redirect_stdout(io.StringIO()):
                fingerprint.check(found.model, fingerprint.of(self.given.model) if self.given else {}, self.name, False)
        except BaseMismatchError as error:
            raise ConfigError(
                f"this row needs the base {form}, which is done by its name, and {self.name!r} is not the base that "
                "was given; pass its own name as base."
            ) from error
        except GraftError as error:
            if not self.given:
                raise
            raise type(error)(f"this row needs the base {form}, which is done by its name: {error}") from error
        return found

    def renew(self, scheme: str | None) -> None:
        """Let go of a base in which a failed run has left something."""
        if scheme in self.held and structure(self.held[scheme].model) != self.held[scheme].shape:
            del self.held[scheme]

    def keep(self, schemes: Collection[str | None]) -> None:
        """Let go of the bases that no later row needs."""
        for scheme in [s for s, base in self.held.items() if s not in schemes and not base.given]:
            del self.held[scheme]
        gc.collect()

    def data_of(self, recipe: Recipe) -> RunData:
        """A recipe's data, loaded once for all that have the same rows."""
        from ..training.setup import load_data_of

        key = recipe.data.model_dump_json(), recipe.training.seed
        if key not in self.data:
            base = self.get(recipe.quantization)
            self.data[key] = load_data_of(recipe, base.tokenizer, base.model.config.is_encoder_decoder)
        return self.data[key]

    def measure(self, recipe: Recipe, result: ComparisonResult, general: General | None = None) -> Evaluation | None:
        """The plain base on the held-out rows, once for each scheme and seed (which may choose the rows)."""
        from .. import training

        scheme, seed = recipe.quantization, recipe.training.seed
        if (scheme, seed) not in self.measured:
            base, rows = self.get(scheme), self.data_of(recipe)
            if scheme not in self.general and general is not None:
                self.general[scheme] = general.measure(base.model, base.tokenizer)["general_loss"]
            self.measured[scheme, seed] = training.measure(recipe, base.model, base.tokenizer, rows)
            result.train_rows = len(rows.train_rows)
            result.eval_rows = len(rows.held_out) if rows.held_out is not None else None
            known = [m.metrics for (s, _), m in self.measured.items() if s == scheme and m is not None]
            means = {key: mean([m[key] for m in known]) for key in ("loss", "perplexity", "accuracy")}
            noted = result.base_metrics if scheme in (None, self.main) else result.quantized.setdefault(scheme, {})
            noted.update(means, base_bytes=base.model.get_memory_footprint(), quantization=scheme_of(base.model))
        return self.measured[scheme, seed]


def made(model: Any, tokenizer: Any, given: bool = False) -> Base:
    """A base that is ready to be measured and trained on."""
    from ..training.runs import made_ready

    made_ready(model, checkpointing=False, quiet=True)
    return Base(model, tokenizer, structure(model), given)


def structure(model: Any) -> list[tuple[str, str, int, int]]:
    """Module types and numbers of hooks: what a run must leave as it found it."""
    return [(n, type(m).__name__, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()]


def mean(values: list[Any]) -> float | None:
    """The mean of the values that are there."""
    found = [v for v in values if v is not None]
    return sum(found) / len(found) if found else None
