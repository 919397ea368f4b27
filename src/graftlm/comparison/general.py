"""General text: what a model forgets of it while it learns something else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import GraftError

ROWS = 100  # held-out rows that are enough for a loss to a hundredth
SPARE = "tweets"  # where the general text is the very data that is trained on


@dataclass
class General:
    """Text on which the loss of the base is compared with that of every adapter.

    Args:
        section: the `data` part of a recipe.
    """

    section: dict[str, Any]

    @classmethod
    def of(cls, given: str | Mapping[str, Any] | None, trained: str) -> General | None:
        """From a source or a `data` part; another bundled one where it is what is trained on."""
        if given is None:
            return None
        if isinstance(given, str):
            source = SPARE if given == trained else given
            return cls({"source": source, "max_eval_examples": ROWS})
        return cls(dict(given))

    @property
    def source(self) -> str:
        return str(self.section.get("source"))

    def measure(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        """`general_loss`: nats a token."""
        from ..training.evaluation import is_encoder_decoder, loss_metrics
        from ..training.schema import Recipe
        from ..training.setup import load_data_of

        seq2seq = is_encoder_decoder(model)
        key = id(tokenizer), seq2seq
        if getattr(self, "_key", None) != key:
            try:
                data = load_data_of(Recipe.from_dict({"data": self.section}), tokenizer, seq2seq)
            except GraftError as error:
                raise type(error)(f"general text: {error}") from error
            self._rows, self._key = data.held_out_rows if data.held_out_rows is not None else data.train_rows, key
        return {"general_loss": loss_metrics(model, tokenizer, self._rows, 32, seq2seq)["loss"]}
