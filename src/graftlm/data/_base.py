"""What every data format is made of: one example becomes a prompt text and an answer text.

    example {column: value}  --Format.pair-->   Pair(prompt, target)
    Pair                     --Format.encode--> token ids [T] and labels [T] (-100 = no loss)

A format is a small frozen dataclass. Its fields that end in ``_column`` are the names of the columns it
reads; the name without that ending is the column's *role*: ``columns={"text": "review"}`` sets
``text_column="review"``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from graftlm.data._pair import End, Pair, end_token_id
from graftlm.data._tokens import Tokens
from graftlm.errors import DataError, nearest

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

F = TypeVar("F", bound="Format")


def text_of(example: Mapping[str, Any], column: str) -> str:
    """The text in ``column``; numbers and truth values become Python's text, a missing value raises DataError."""
    value = example[column]
    if value is None or value != value:  # NaN, which tables of numbers have for a missing one
        raise DataError(f"column {column!r} is empty (null); fill it in or filter the row out")
    if isinstance(value, (list, dict, bytes)):
        raise DataError(f"column {column!r} holds a {type(value).__name__}, expected text")
    return str(value)


def optional_text(example: Mapping[str, Any], column: str) -> str:
    """The text in ``column``; empty where there is no such column or no value in it."""
    value = example.get(column)
    return "" if value is None or value != value else text_of(example, column)


@dataclass(frozen=True, kw_only=True)
class Format:
    """Turns examples into prompts and answers.

    Fields: ``max_length`` is the longest example in tokens, prompt, answer and end token together; ``end``
    is the token after the answer: ``eos``, ``pad`` (as document 001 does; ``eos`` where the tokenizer has
    no pad token) or ``none`` (only what the tokenizer itself appends).
    """

    name: ClassVar[str] = ""
    optional: ClassVar[frozenset[str]] = frozenset()  # roles whose column may be absent
    max_input_length: ClassVar[int | None] = None
    max_output_length: ClassVar[int | None] = None

    max_length: int = 512
    end: End = "eos"

    def __post_init__(self) -> None:
        if self.end not in ("eos", "pad", "none"):
            raise DataError(f"end={self.end!r} is none of 'eos', 'pad', 'none'")
        for limit in ("max_length", "max_input_length", "max_output_length"):
            value = getattr(self, limit)
            if value is not None and value < 1:
                raise DataError(f"{limit}={value!r}; expected a number of tokens of at least 1")

    @classmethod
    def match(cls: type[F], columns: Iterable[str]) -> F | None:
        """This format with its columns found among ``columns``, or None where they are not there."""
        have = set(columns)
        fmt = cls()
        return fmt if all(c in have for role, c in fmt.columns().items() if role not in cls.optional) else None

    def columns(self) -> dict[str, str]:
        """``{role: column name}``; roles without a column yet are left out."""
        fields = (f.name for f in dataclasses.fields(self) if f.name.endswith("_column"))
        return {f.removesuffix("_column"): getattr(self, f) for f in fields if getattr(self, f) is not None}

    def with_columns(self: F, columns: Mapping[str, str]) -> F:
        """A copy that reads the given columns, ``{role: column name}``."""
        fields = [f.name for f in dataclasses.fields(self) if f.name.endswith("_column")]
        roles = [field.removesuffix("_column") for field in fields]
        for role in columns:
            if role not in roles:
                raise DataError(
                    f"format {self.name!r} has no column role {role!r}; its roles are {', '.join(roles)}"
                    f"{nearest(role, roles)}"
                )
        changes: dict[str, Any] = {f"{role}_column": column for role, column in columns.items()}
        return dataclasses.replace(self, **changes)

    def bind(self: F, dataset: Dataset) -> F:
        """Checks the columns of ``dataset`` and takes from it what the format needs to know (classes).

        Raises DataError that names every missing column, what is there, and the nearest name.
        """
        have = dataset.column_names
        missing = {r: c for r, c in self.columns().items() if c not in have and r not in self.optional}
        if missing:
            lines = [f"  {role}: {column!r} is not there{nearest(column, have)}" for role, column in missing.items()]
            example = next(iter(missing))
            raise DataError(
                f"format {self.name!r} needs columns that the data set lacks; it has {have}:\n"
                + "\n".join(lines)
                + f"\nName the right ones, as in columns={{{example!r}: {have[0]!r}}}, or another format"
            )
        return self

    def pair(self, example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None = None) -> Pair:
        """Prompt and answer of one example as text. Only ``chat`` uses the tokenizer (for its template)."""
        raise NotImplementedError

    def encode(self, example: Mapping[str, Any], tokens: Tokens) -> tuple[list[int], list[int]]:
        """Token ids and labels, both [T], not yet cut to ``max_length``; labels -100 outside the answer."""
        return tokens.join(self.pair(example), self.end, max_input=self.max_input_length, max_output=self.max_output_length)

    def end_token_id(self, tokenizer: PreTrainedTokenizerBase) -> int | None:
        """Id of the token that ends an answer (what generation should stop at), None for ``end="none"``."""
        return end_token_id(tokenizer, self.end)
