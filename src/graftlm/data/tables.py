"""Local text files as tables: CSV, TSV, JSON, JSON lines. Every value reads as the text that stands in the file.

A column becomes numbers only where `str` of them gives back what is written, in every row of every split: the labels
`0, 1, 2` are integers, the postcodes `02108`, the prices `1.50` and a mixture of `1` and `2.5` stay texts. Nothing is
taken for a date, a truth value or a missing value, but for JSON's own `true`, `false` and `null`.
"""

from __future__ import annotations

import csv
import io
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftlm.data.chat import COLUMNS as CONVERSATIONS
from graftlm.errors import DataError
from graftlm.files import lines_of, parse_json, read_text

if TYPE_CHECKING:
    from datasets import DatasetDict

Columns = dict[str, list[Any]]

DELIMITERS = {".csv": ",", ".tsv": "\t"}
ENDINGS = (".json", ".jsonl", *DELIMITERS)
OTHER_DELIMITERS = (",", ";", "\t", "|")
INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")
DECIMAL = re.compile(r"-?[0-9]+\.[0-9]+(e[-+]?[0-9]+)?")


class Written(float):
    """A number with a point or an exponent, and how the file writes it."""

    def __new__(cls, text: str) -> Written:
        made = super().__new__(cls, text)
        made.text = text
        return made

    text: str


def read_tables(splits: Mapping[str, Sequence[Path]]) -> DatasetDict:
    """The files of each split as one data set of all splits.

    Raises:
        DataError: names file and line of what cannot be read, and the columns in which files of one split differ.
    """
    from datasets import Dataset, DatasetDict

    tables = {name: joined({path: read_table(path) for path in paths}) for name, paths in splits.items()}
    columns = {name: None for table in tables.values() for name in table}
    for name in columns:
        settle_all([table[name] for table in tables.values() if name in table])
    made = {}
    for split, table in tables.items():
        try:
            made[split] = Dataset.from_dict(table, **mixed(table))
        except Exception as error:  # pyarrow's and datasets' own, of many kinds
            names = ", ".join(str(path) for path in splits[split])
            raise DataError(f"cannot read {names} as a table: {type(error).__name__}: {error}") from error
    return DatasetDict(made)


def mixed(table: Columns) -> dict[str, Any]:
    """Nested values of several shapes are kept as they are, where this version of datasets can."""
    import inspect

    from datasets import Dataset

    nested = any(isinstance(value, (list, dict)) for values in table.values() for value in values)
    able = "on_mixed_types" in inspect.signature(Dataset.from_dict).parameters
    return {"on_mixed_types": "use_json"} if nested and able else {}


def joined(tables: Mapping[Path, Columns]) -> Columns:
    """Tables of one split under each other. DataError where their columns differ."""
    (first, whole), *others = tables.items()
    for path, table in others:
        if set(table) != set(whole):
            raise DataError(
                f"files of one split must have the same columns: {first.name} has {list(whole)}, "
                f"{path.name} has {list(table)}"
            )
        for name, values in table.items():
            whole[name] += values
    return whole


def read_table(path: Path) -> Columns:
    """One file as columns of what is written."""
    try:
        text = read_text(path, DataError)
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read: {error.strerror or error}") from error
    if not text.strip():
        raise DataError(f"{str(path)!r} is empty; expected at least one row")
    ending = path.suffix.lower()
    return read_delimited(path, text, DELIMITERS[ending]) if ending in DELIMITERS else read_json(path, text)


# -- CSV and TSV -----------------------------------------------------------------------------------------------------
def read_delimited(path: Path, text: str, usual: str) -> Columns:
    """Rows between delimiters: the usual one of the file's ending, or the one that its first line is parted by."""
    if in_first_row(text, usual) > 1:
        delimiter = usual
    else:
        delimiter = max((usual, *OTHER_DELIMITERS), key=lambda other: in_first_row(text, other))
    with whole_fields():
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        begins = 1
        try:
            header = [name.strip() or f"Unnamed: {i}" for i, name in enumerate(next(reader))]
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                raise DataError(f"{str(path)!r} has two columns called {', '.join(twice)}; rename one of them")
            table: Columns = {name: [] for name in header}
            begins = reader.line_num + 1
            for row in reader:
                if row and len(row) != len(header):
                    raise DataError(
                        f"{str(path)!r}, line {begins}: {len(row)} values for {len(header)} columns ({', '.join(header)}). "
                        f'Put values that hold {delimiter!r} in double quotes, and write a quote in them twice ("")'
                    )
                for values, value in zip(table.values(), row, strict=False):  # an empty line has no values
                    values.append(value)
                begins = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{str(path)!r}, line {begins}: {error}. A value that begins with a double quote ends with one, and a quote "
                'within it is written twice ("")'
            ) from error
    return {name: as_numbers(values) for name, values in table.items()}


def in_first_row(text: str, delimiter: str) -> int:
    """Columns that a delimiter makes of the first row."""
    with whole_fields():
        return len(next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)))


@contextmanager
def whole_fields() -> Iterator[None]:
    """Within the block a value may be of any length."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def as_numbers(texts: list[str]) -> list[Any]:
    """The texts as numbers where all of them are written as numbers, else as they are."""
    found: list[Any] = []
    for text in texts:
        if INTEGER.fullmatch(text):
            found.append(int(text))
        elif DECIMAL.fullmatch(text):
            found.append(Written(text))
        else:
            return texts
    return found


# -- JSON and JSON lines ---------------------------------------------------------------------------------------------
def read_json(path: Path, text: str) -> Columns:
    """A list of objects (or of texts), one object, or an object a line."""
    rows = None
    if path.suffix.lower() == ".json" or text.lstrip().startswith("["):
        rows = whole_json(path, text)
    if rows is None:
        numbered = [(i, line) for i, line in enumerate(lines_of(text), 1) if line.strip()]
        rows = [(f"line {i}", load(f"{str(path)!r}, line {i}", line)) for i, line in numbered]
    table: Columns = {}
    for i, (place, row) in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{str(path)!r}, {place}: expected an object of columns, got a {type(row).__name__}")
        for name, value in row.items():
            table.setdefault(name, [None] * i).append(value)
        for values in table.values():
            if len(values) == i:
                values.append(None)
    if not table:
        raise DataError(f"{str(path)!r} has no rows with columns; expected at least one")
    return table


def check_inside(path: Path, value: dict[str, Any]) -> None:
    """DataError for one object that has a list of rows in it."""
    lists = {k: v for k, v in value.items() if isinstance(v, list) and v and all(isinstance(x, dict) for x in v)}
    for name, rows in lists.items():
        if name not in CONVERSATIONS:
            raise DataError(
                f"{str(path)!r} holds one object, whose entry {name!r} is a list of {len(rows)} objects. If these are the "
                "rows, save that list alone (a split a file: train.json, test.json)"
            )


def whole_json(path: Path, text: str) -> list[tuple[str, Any]] | None:
    """The rows of a file that is one JSON value, with their places; None for a file of several."""
    try:
        value = load(repr(str(path)), text)
    except DataError as error:
        if "Extra data" in str(error) and not text.lstrip().startswith("["):
            return None
        raise DataError(f"cannot read {error}") from error
    rows = value if isinstance(value, list) else [value]
    if isinstance(value, dict):
        check_inside(path, value)
    return [(f"row {i}", {"text": row} if isinstance(row, str) else row) for i, row in enumerate(rows)]


def load(where: str, text: str) -> Any:
    """A JSON value; its NaN, which no JSON has, is a missing value."""
    return parse_json(
        text, where, DataError, parse_float=Written, parse_constant=lambda name: None if name == "NaN" else Written(name)
    )


# -- kinds of columns ------------------------------------------------------------------------------------------------
def settle_all(parts: list[list[Any]]) -> None:
    """Give a column one kind in all splits, in place."""
    whole = settle([value for part in parts for value in part])
    start = 0
    for part in parts:
        part[:] = whole[start : start + len(part)]
        start += len(part)


def settle(values: list[Any]) -> list[Any]:
    """Values of one kind: numbers where nothing of how they are written is lost, else texts (nested values stay)."""
    kinds = {type(value) for value in values if value is not None}
    if kinds & {list, dict} or kinds <= {str} or kinds == {bool}:
        return values
    if kinds == {int} and all(value is None or abs(value) < 2**63 for value in values):
        return values
    if kinds == {Written} and all(value is None or is_exact(value) for value in values):
        return [None if value is None else float(value) for value in values]
    return [None if value is None else as_text(value) for value in values]


def as_text(value: Any) -> str:
    """A value as a file has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return value.text if isinstance(value, Written) else str(value)


def is_exact(number: Written) -> bool:
    """Whether the number as Python writes it is what the file has."""
    return math.isfinite(number) and repr(float(number)) == number.text
