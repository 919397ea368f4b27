"""The data formats, one small class each, and the registry that finds them by name or by column names.

| name         | columns                                           | prompt (masked)               | answer     |
|--------------|---------------------------------------------------|-------------------------------|------------|
| `label`      | `Tweet text`, `text_label` or `Label`             | `Tweet text : … Label : `     | label      |
| `text`       | `prompt`, `quote` or `text`                       | none, all is labelled         | text       |
| `alpaca`     | `instruction`, `input` (optional), `output`       | `Human: …` `Assistant: `      | output     |
| `adgen`      | `content`, `input` (optional), `summary`          | `prompt_text` + content       | summary    |
| `chat`       | `messages` or `conversations`, `system` (optional)| all but the assistant's turns | turns      |
| `completion` | `prompt` and `completion`, likes of them, any two | prompt + `separator`          | completion |

`names` tells the likes of these column names, and what is said when a column that looks like an answer is left over.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from graftlm.data._base import Format, optional_text, text_of
from graftlm.data._pair import End, Pair
from graftlm.data.chat import ChatFormat
from graftlm.data.names import CONTEXTS, answer_among, check_unused, likely_pair, plain
from graftlm.errors import DataError, nearest

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from graftlm.data._tokens import Tokens

_WORD = re.compile(r"\s*(?:[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+)")


@dataclass(frozen=True, kw_only=True)
class LabelFormat(Format):
    """A labelled text, as in document 001: ``Tweet text : @united late again Label : complaint``.

    ``classes`` are the label texts. When not given they come from the label column: the names of a
    ClassLabel with ``_`` turned into a space, otherwise its distinct values in sorted order. ``label_ids``
    says that the column holds indices into ``classes``; it is found out too (true for a ClassLabel, and for
    integers when classes are given).
    """

    name: ClassVar[str] = "label"
    text_column: str = "Tweet text"
    label_column: str | None = None
    classes: tuple[str, ...] | None = None
    label_ids: bool | None = None
    template: str = "{column} : {text} Label : "
    max_length: int = 64
    end: End = "pad"

    @classmethod
    def match(cls, columns: Iterable[str]) -> LabelFormat | None:
        have = list(columns)
        text = next((c for c in ("Tweet text", "text", "sentence", "review") if c in have), None)
        label = next((c for c in ("text_label", "Label", "label") if c in have), None)
        return cls(text_column=text, label_column=label) if text and label else None

    def bind(self, dataset: Dataset) -> LabelFormat:
        found = self.match(dataset.column_names)
        column = self.label_column or (found and found.label_column) or "text_label"
        fmt = super(LabelFormat, dataclasses.replace(self, label_column=column)).bind(dataset)
        if fmt.classes is not None and fmt.label_ids is not None:
            return fmt
        from datasets import ClassLabel

        feature = dataset.features[column]
        if isinstance(feature, ClassLabel):
            names = tuple(name.replace("_", " ") for name in feature.names)
            return dataclasses.replace(fmt, classes=fmt.classes or names, label_ids=True)
        if fmt.classes is not None:
            return dataclasses.replace(fmt, label_ids=str(getattr(feature, "dtype", "")).startswith(("int", "uint")))
        distinct = {str(value) for value in dataset.unique(column) if value is not None}
        return dataclasses.replace(fmt, classes=tuple(sorted(distinct)), label_ids=False)

    def pair(self, example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None = None) -> Pair:
        text = text_of(example, self.text_column)
        return Pair(prompt=self.template.format(column=self.text_column, text=text), target=self._label(example))

    def _label(self, example: Mapping[str, Any]) -> str:
        column = self.label_column or "text_label"
        value, classes = example[column], self.classes or ()
        if not self.label_ids or value is None:
            return text_of(example, column)
        if not 0 <= value < len(classes):
            raise DataError(f"label {value} in column {column!r} is no index into classes {classes}")
        return classes[value]


@dataclass(frozen=True, kw_only=True)
class TextFormat(Format):
    """Running text, as documents 002 and 004 train on prompts and quotes: every token is labelled.

    No end token follows by default.
    For generation the first ``prompt_words`` words are the prompt and the rest is the reference; a CJK
    character counts as a word.
    """

    name: ClassVar[str] = "text"
    text_column: str = "text"
    prompt_words: int = 4
    end: End = "none"

    @classmethod
    def match(cls, columns: Iterable[str]) -> TextFormat | None:
        have = list(columns)
        found = next((c for c in ("prompt", "quote", "text") if c in have), None)
        return cls(text_column=found) if found else None

    def pair(self, example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None = None) -> Pair:
        text = text_of(example, self.text_column)
        words = _WORD.findall(text)
        cut = len("".join(words[: min(self.prompt_words, max(len(words) - 1, 0))]))
        return Pair(prompt=text[:cut], target=text[cut:])

    def encode(self, example: Mapping[str, Any], tokens: Tokens) -> tuple[list[int], list[int]]:
        return tokens.join(Pair(prompt="", target=text_of(example, self.text_column)), self.end)


@dataclass(frozen=True, kw_only=True)
class AlpacaFormat(Format):
    """An instruction with its answer, as in document 003: ``Human: …\\n\\nAssistant: …``."""

    name: ClassVar[str] = "alpaca"
    optional: ClassVar[frozenset[str]] = frozenset({"input"})
    instruction_column: str = "instruction"
    input_column: str = "input"
    output_column: str = "output"
    max_length: int = 256

    @classmethod
    def match(cls, columns: Iterable[str]) -> AlpacaFormat | None:
        have = list(columns)
        output = answer_among(have, "output") if "instruction" in have else None
        if output is None:
            return None
        extra = [c for c in have if plain(c) in CONTEXTS]
        given = next((c for c in extra if plain(c) == "input"), extra[0] if extra else "input")
        return cls(input_column=given, output_column=output)

    def pair(self, example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None = None) -> Pair:
        human = f"Human: {text_of(example, self.instruction_column)}\n{optional_text(example, self.input_column)}"
        return Pair(prompt=f"{human.strip()}\n\nAssistant: ", target=text_of(example, self.output_column))


@dataclass(frozen=True, kw_only=True)
class AdgenFormat(Format):
    """An advertisement from key words, as in document 004; ``prompt_text`` stands in front of every content.

    ChatGLM's tokenizer makes ``[gMASK] sop content summary eos``; others their own leading tokens, then the
    same. ``max_input_length`` and ``max_output_length`` count special tokens.
    """

    name: ClassVar[str] = "adgen"
    optional: ClassVar[frozenset[str]] = frozenset({"input"})
    content_column: str = "content"
    input_column: str = "input"
    summary_column: str = "summary"
    prompt_text: str = ""
    max_input_length: int | None = 512  # type: ignore[misc]  # a field here, a constant in the base
    max_output_length: int | None = 1536  # type: ignore[misc]
    max_length: int = 2048

    def pair(self, example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None = None) -> Pair:
        question = self.prompt_text + text_of(example, self.content_column)
        extra = optional_text(example, self.input_column)
        if extra.strip():
            question += f"\n{extra}"
        return Pair(prompt=question, target=text_of(example, self.summary_column))


@dataclass(frozen=True, kw_only=True)
class CompletionFormat(Format):
    """A prompt and its completion, from any two columns; ``separator`` is put between them (masked)."""

    name: ClassVar[str] = "completion"
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    separator: str = ""

    @classmethod
    def match(cls, columns: Iterable[str]) -> CompletionFormat | None:
        pair = likely_pair(list(columns))
        return cls(prompt_column=pair[0], completion_column=pair[1]) if pair else None

    def pair(self, example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None = None) -> Pair:
        prompt = text_of(example, self.prompt_column) + self.separator
        return Pair(prompt=prompt, target=text_of(example, self.completion_column))


FORMATS: dict[str, type[Format]] = {
    "label": LabelFormat,
    "text": TextFormat,
    "alpaca": AlpacaFormat,
    "adgen": AdgenFormat,
    "chat": ChatFormat,
    "completion": CompletionFormat,
}
_GUESS_ORDER = ("chat", "alpaca", "adgen", "completion", "label", "text")


def guess_format(columns: Iterable[str]) -> Format:
    """The format whose columns are all among ``columns``, its column names filled in.

    Raises DataError where none fits, or where a column that looks like the answers would not be trained on.
    """
    have = list(columns)
    found = _first_match(have)
    check_unused(found, have)
    return found


def _first_match(have: list[str]) -> Format:
    for name in _GUESS_ORDER:
        found = FORMATS[name].match(have)
        if found is not None:
            return found
    raise DataError(
        f"no format fits the columns {have}. Name one and its columns, for example format='completion', "
        f"columns={{'prompt': {have[0] if have else 'question'!r}, 'completion': "
        f"{have[-1] if have else 'answer'!r}}}; formats: {', '.join(FORMATS)}"
    )


def _named(name: str, have: list[str], columns_given: bool) -> Format:
    """The format of that name, its columns by their names where those are not to be given."""
    try:
        fmt = FORMATS[name].match(have) or FORMATS[name]()
    except DataError:  # several columns may be meant
        if columns_given:
            return FORMATS[name]()
        raise
    if not columns_given:
        check_unused(fmt, have)
    return fmt


def get_format(
    format: str | Format | None = None,
    *,
    available: Iterable[str] = (),
    columns: Mapping[str, str] | None = None,
    **options: Any,
) -> Format:
    """A format by name, by guess (None) from the column names ``available``, or as given; then changed.

    Args:
        columns: ``{role: column name}`` to read instead of the usual ones, e.g. ``{"text": "review"}``.
        options: any other field of the format, e.g. ``max_length=128`` or ``end="eos"``.

    Raises DataError for an unknown name, role or option, with the nearest one.
    """
    have = list(available)
    if isinstance(format, Format):
        fmt = format
    elif format is None:
        fmt = _first_match(have) if columns else guess_format(have)  # columns that are named are meant
    elif format in FORMATS:
        fmt = _named(format, have, bool(columns))
    else:
        known = ", ".join(FORMATS)
        raise DataError(f"unknown format {format!r}; formats are {known}{nearest(str(format), FORMATS)}")
    if columns:
        fmt = fmt.with_columns(columns)
    names = [f.name for f in dataclasses.fields(fmt)]
    for option in options:
        if option not in names:
            raise DataError(
                f"format {fmt.name!r} has no option {option!r}; its options are {', '.join(names)}{nearest(option, names)}"
            )
    if options.get("classes") is not None:
        options["classes"] = tuple(options["classes"])
    return dataclasses.replace(fmt, **options)
