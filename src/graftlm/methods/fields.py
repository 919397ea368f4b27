"""Configuration fields: what each may hold, read from its annotation, and HF PEFT's fields that GraftLM does not have.

`Count`, `Probability` and their like are annotations with a limit; `check_fields` raises one clear error for the first field
that does not hold what it says, whatever the method.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import os
import re
import types
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import ConfigError, UnsupportedError

C = TypeVar("C")


class Limit(NamedTuple):
    """What a field's values are, in words, and the test for it."""

    words: str
    holds: Callable[[Any], bool]


Count = Annotated[int, Limit("a whole number above 0", lambda value: value > 0)]
Whole = Annotated[int, Limit("a whole number of at least 0", lambda value: value >= 0)]
Number = Annotated[float, Limit("a finite number", math.isfinite)]
Positive = Annotated[float, Limit("a number above 0", lambda value: 0 < value < math.inf)]
Probability = Annotated[float, Limit("a probability, 0 <= p < 1", lambda value: 0 <= value < 1)]

WORDS = {
    bool: "True or False", int: "a whole number", float: "a number", str: "a string", dict: "a dictionary",
    type(None): "None",
}  # fmt: skip


def check_fields(config: Any) -> None:
    """Put each field into plain Python types (lists, numbers, paths as strings) and check it.

    Raises:
        ConfigError: a field holds something else than its annotation says.
    """
    for name, hint in hints(type(config)).items():  # type: ignore[arg-type]
        value = plain(getattr(config, name), hint)
        setattr(config, name, value)
        check(name, value, hint)


@functools.cache
def hints(kind: Any) -> dict[str, Any]:
    """The annotations of a configuration's fields; none where they cannot be resolved (a class within a function)."""
    try:
        found = get_type_hints(kind, include_extras=True)
    except NameError:
        return {}
    return {f.name: found[f.name] for f in dataclasses.fields(kind)}


def kinds(hint: Any) -> tuple[Any, ...]:
    """The alternatives of an annotation."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def plain(value: Any, hint: Any) -> Any:
    """`value` as a list where it is another collection, a Python number where it is numpy's, a string where it is a path."""
    takes = {get_origin(kind) or kind for kind in kinds(hint)}
    if isinstance(value, (set, frozenset, tuple, range)) and list in takes:
        return list(value) if isinstance(value, (tuple, range)) else sorted(value, key=str)
    if value is None and dict in takes and type(None) not in takes:
        return {}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (bool, int, float, enum.Enum)):
        return value
    return int(value) if isinstance(value, Integral) else float(value) if isinstance(value, Real) else value


def check(name: str, value: Any, hint: Any) -> None:
    """ConfigError unless `value` is what `hint` says."""
    if any(fits(value, kind) for kind in kinds(hint)):
        return
    tables = [kind for kind in kinds(hint) if get_origin(kind) is dict]
    if isinstance(value, dict) and tables:
        key_kind, item_kind = get_args(tables[0])
        for key, item in value.items():
            check(f"a key of {name}", key, key_kind)
            check(f"{name}[{key!r}]", item, item_kind)
    lists = any(get_origin(kind) is list for kind in kinds(hint))
    mend = f"; write {name}=[{value!r}]" if lists and isinstance(value, str) else ""
    raise ConfigError(f"{name}={value!r}: expected {words(hint)}{mend}.")


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of one kind."""
    name = getattr(kind, "__name__", "")
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return fits(value, inner[0]) and inner[1].holds(value)
    if origin is list:
        return isinstance(value, list) and all(any(fits(v, k) for k in kinds(inner[0])) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if kind is Any:
        return True
    if origin is Literal:
        return value in inner
    if origin is not None or not isinstance(kind, type):  # of a user's own method
        return isinstance(value, origin) if isinstance(origin, type) else True
    if kind in (int, float):
        return isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    if issubclass(kind, enum.Enum):
        return True  # its own check names the members
    # an object of HF PEFT's class of this name will do
    return isinstance(value, kind) or (dataclasses.is_dataclass(kind) and type(value).__name__ == name)


def check_expressions(name: str, value: Any) -> None:
    """ConfigError for a string, or a key of a table, that is read as a regular expression and is none."""
    for entry in [value] if isinstance(value, str) else value if isinstance(value, dict) else ():
        try:
            re.compile(entry)
        except re.error as error:
            raise ConfigError(f"{name}: {entry!r} is no regular expression ({error}).") from None


def words(hint: Any) -> str:
    """An annotation in words."""
    found = []
    for kind in kinds(hint):
        origin, inner = get_origin(kind), get_args(kind)
        if origin is Annotated:
            found.append(inner[1].words)
        elif origin is Literal:
            found += [repr(value) for value in inner]
        elif origin is list:
            found.append("a list of strings" if inner[0] is str else "a list of whole numbers")
        elif origin is dict:
            found.append("a dictionary")
        else:
            found.append(WORDS.get(kind, f"a {getattr(kind, '__name__', kind)}"))
    return " or ".join(dict.fromkeys(found))


def also_takes(elsewhere: dict[str, Any]) -> Callable[[type[C]], type[C]]:
    """Class decorator: a constructor takes HF PEFT's fields that are not here, as long as they change nothing.

    `elsewhere` holds their defaults; `...` for what never matters. UnsupportedError for one that is switched on.
    """

    def wrap(kind: Any) -> Any:
        own = kind.__init__

        @functools.wraps(own)
        def init(self: Any, *args: Any, **given: Any) -> None:
            refuse_switched_on(kind.__name__, {k: given.pop(k) for k in elsewhere if k in given}, elsewhere)
            own(self, *args, **given)

        kind.__init__ = init
        return kind

    return wrap


def refuse_switched_on(where: str, given: dict[str, Any], neutral: dict[str, Any]) -> None:
    """UnsupportedError for arguments of HF PEFT that GraftLM does not have and that are not neutral."""
    on = [k for k, v in given.items() if neutral[k] is not ... and v != neutral[k] and not is_off(v)]
    if on:
        listed = ", ".join(f"{k}={given[k]!r}" for k in on)
        raise UnsupportedError(f"{where}: GraftLM does not have HF PEFT's {listed}. Leave it out.")


def is_off(value: Any) -> bool:
    """Whether an option's value asks for nothing: empty, or a group of settings that are all off."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return all(is_off(v) for v in value.values())
    return value is None or value is False or (isinstance(value, Iterable) and not list(value))
