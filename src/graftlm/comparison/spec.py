"""A method with its options, in one line of text.

    lora
    lora:r=16,use_dora=true
    prompt-tuning:quantization=nf4
    prompt-tuning:num_virtual_tokens=8,training.learning_rate=0.3,training.epochs=10

    lora:r=4|8|16,training.learning_rate=1e-3|3e-3

Values with `|` between them make a row each (of a grid: every combination); inside brackets or quotes `|` is itself.
A key without a dot is an option of the method; one with a dot is a path in the recipe, and so is `quantization`. Values
are read as YAML. `lora-int8` and `qlora` are LoRA over an int8 and an NF4 base. Names are those of recipes, aliases too;
`all` stands for the usual ones (METHODS), `every` for all that need no options; options behind them are of each.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError, nearest

METHODS = ("lora", "lora-int8", "qlora", "prompt-tuning", "p-tuning", "prefix-tuning", "bottleneck")


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """One row of a comparison.

    Attributes:
        label: what it is called in tables; the text it was made from.
        method: name of the method.
        options: options of the method's configuration.
        overrides: parts of the recipe, nested.
    """

    label: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        """The label as a folder name."""
        return re.sub(r"[^A-Za-z0-9]+", "-", self.label).strip("-")


def groups() -> dict[str, list[str]]:
    """Names that stand for several methods."""
    from ..training.defaults import DEFAULTS, OTHER, method_names

    able = [name for name, kind in method_names().items() if not DEFAULTS.get(kind, OTHER).needs]
    return {"all": list(METHODS), "every": list(dict.fromkeys([*METHODS, *able]))}


def parse(text: str) -> MethodSpec:
    """A line as above, of one method; ConfigError with what is wrong in it."""
    from ..training.defaults import ALIASES, QUANTIZED, method_names, plain_name

    given, _, rest = text.strip().partition(":")
    name = plain_name(given)
    known = [*method_names(), *QUANTIZED, *ALIASES]
    if name not in known:
        listed = ", ".join([*method_names(), *QUANTIZED])
        raise ConfigError(f"{given!r} is not a method; methods are {listed}{nearest(name, known)}")
    method, scheme = QUANTIZED.get(name, (ALIASES.get(name, name), None))
    options: dict[str, Any] = {}
    overrides: dict[str, Any] = {"quantization": scheme} if scheme else {}
    seen: set[str] = set()
    for part in split(rest):
        key, given, value = part.partition("=")
        key = key.strip()
        if not given or not key:
            raise ConfigError(f"{part!r} in {text!r}: expected OPTION=VALUE, as in lora:r=16,use_dora=true.")
        if key == "quantization" and scheme not in (None, value.strip()):
            raise ConfigError(f"{text!r}: {name} is {method}:quantization={scheme}; write {method}:{part.strip()} instead.")
        if key in seen:
            raise ConfigError(f"{text!r} gives {key} twice; keep one, or write {key}=A|B for a row each.")
        seen.add(key)
        if "." in key or key == "quantization":
            put(overrides, key, read(value))
        else:
            options[key] = read(value)
    return MethodSpec(label=text.strip(), method=method, options=options, overrides=overrides)


def expand(text: str) -> list[str]:
    """The lines that a line stands for: a method's, for every combination of its values, and those of each in a group."""
    name, colon, rest = text.strip().partition(":")
    if (members := groups().get(name.lower())) is not None:
        return [line for member in members for line in expand(member + colon + rest)]
    choices = []
    for part in split(rest):
        key, given, value = part.partition("=")
        choices.append([f"{key.strip()}{given}{v.strip()}" for v in split(value, "|")] if given else [part])
    return [name + colon + ",".join(found) for found in itertools.product(*choices)] if choices else [text]


def split(text: str, at: str = ",") -> list[str]:
    """Parts between commas (or another sign) that stand in no bracket and no quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if letter in "'\"" and quote in ("", letter):
            quote = "" if quote else letter
        depth += (letter in "[{(") - (letter in "]})") if not quote else 0
        if letter == at and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [p for p in parts if p.strip()]


def read(text: str) -> Any:
    """A value as recipes read it: YAML, and 1e-3 as the number that it is."""
    import yaml

    from ..training.schema import load_yaml

    try:
        return load_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{text!r} is no YAML value: {error}") from error


def put(target: dict[str, Any], path: str, value: Any) -> None:
    """Set a dotted path in nested mappings."""
    *parents, last = path.split(".")
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise ConfigError(f"{path!r}: {parent!r} has a value already and cannot hold {last!r}.")
    target[last] = value


def merged(*layers: Mapping[str, Any] | None) -> dict[str, Any]:
    """Nested mappings, later ones over earlier ones."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in (layer or {}).items():
            old = result.get(key)
            result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return result


def parse_all(methods: Sequence[str | MethodSpec]) -> list[MethodSpec]:
    """All rows; ConfigError where there are none, or two of one name."""
    specs = [s for m in methods for s in ([m] if isinstance(m, MethodSpec) else map(parse, expand(m)))]
    if not specs:
        raise ConfigError("No methods to compare.")
    folders = [s.slug for s in specs]
    twice = sorted({f for f in folders if folders.count(f) > 1})
    if twice:
        raise ConfigError(f"These methods stand in the list twice: {', '.join(twice)}. Use seeds to repeat one.")
    return specs
