"""Between a recipe's schema, a form and YAML.

A form's values are texts by dotted keys, `training.epochs`. What is empty is left out of the recipe, which then has its
default; so the YAML holds only what was said. Keys that the form does not have stay in the YAML as they are.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from ..errors import ConfigError, RecipeError
from ..training.defaults import HIDDEN_FIELDS, QUANTIZED, config_type, defaults_of, method_names
from ..training.schema import Recipe, load_yaml
from .recipes import OWN

BASIC = (
    "base", "quantization", "method", "data.source", "data.format", "training.epochs", "training.learning_rate",
    "training.batch_size", "data.max_length",
)  # fmt: skip
OPTIONS = "method_options."
SIGNS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}  # of limits in a JSON schema
HELP = {
    "method": "which adapter is trained; lora-int8 and qlora are LoRA over a base in int8 and nf4"
}  # for a list of names


def fields() -> list[dict[str, Any]]:
    """Every field of a recipe: key, section, kind (text, integer, number, boolean, choice, yaml), help, default (as
    it is typed), limits."""
    schema = Recipe.model_json_schema()
    found = []
    for name, entry in schema["properties"].items():
        if name in OWN or name == "method_options":
            continue
        section = entry.get("$ref") or next((e["$ref"] for e in entry.get("allOf", ()) if "$ref" in e), "")
        if not section:
            found.append(field_of(name, entry))
            continue
        inner = schema["$defs"][section.rpartition("/")[2]]["properties"]
        found += [field_of(f"{name}.{key}", value) for key, value in inner.items()]
    return [f | {"basic": f["key"] in BASIC} for f in sorted(found, key=order)]


def order(field: dict[str, Any]) -> int:
    return BASIC.index(field["key"]) if field["key"] in BASIC else len(BASIC)


def field_of(key: str, entry: dict[str, Any]) -> dict[str, Any]:
    """A field out of its JSON schema."""
    kinds = [e for e in entry.get("anyOf", [entry]) if e.get("type") != "null"]
    first = kinds[0]
    choices = next((e["enum"] for e in kinds if "enum" in e), None)
    kind = first.get("type", "yaml")
    if choices and len(kinds) == 1:
        kind = "choice"
    elif len(kinds) > 1 or kind in ("object", "array"):
        kind = "yaml"
    section, _, name = key.rpartition(".")
    limits = ", ".join(f"{sign} {first[name]}" for name, sign in SIGNS.items() if name in first)
    if key == "method":
        kind, choices = "choice", [*method_names(), *QUANTIZED]
    return {
        "key": key, "section": section, "name": name or key, "kind": {"string": "text"}.get(kind, kind), "choices": choices,
        "help": HELP.get(key, entry.get("description", "")), "default": text_of(entry.get("default")), "limits": limits,
    }  # fmt: skip


def option_fields(method: str) -> list[dict[str, Any]]:
    """The fields of a method's configuration that a text can give, with the recipe's own default of each."""
    method = QUANTIZED.get(method, (method,))[0]
    try:
        kind, given = config_type(method), defaults_of(method).options
    except ConfigError:
        return []
    hints, texts = get_type_hints(kind), helps(kind)
    found = []
    for f in dataclasses.fields(kind):
        if f.name in HIDDEN_FIELDS or not f.init:
            continue
        default = None if f.default is dataclasses.MISSING else f.default
        default = given.get(f.name, getattr(default, "value", default))
        found.append(
            {
                "key": OPTIONS + f.name, "section": "method_options", "name": f.name, "kind": kind_of(hints[f.name]),
                "choices": None, "help": texts.get(f.name, ""), "default": text_of(default), "limits": "", "basic": False,
            }
        )  # fmt: skip
    return found


ARGUMENTS = re.compile(r"^Args:\n((?:    .*\n?|\n)+)", re.M)
ARGUMENT = re.compile(r"^    (\w+(?:, \w+)*): (.*\n?(?:        .*\n?)*)", re.M)


def helps(kind: type) -> dict[str, str]:
    """What a configuration's documentation says of its fields, and what the classes below it say."""
    found: dict[str, str] = {}
    for own in reversed(kind.__mro__):
        arguments = ARGUMENTS.search(inspect.cleandoc(vars(own).get("__doc__") or ""))
        for names, text in ARGUMENT.findall(arguments[1] if arguments else ""):
            found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found


def kind_of(hint: Any) -> str:
    """A type as a form's kind."""
    parts = [a for a in get_args(hint) if a is not type(None)] if get_origin(hint) in (Union, types.UnionType) else [hint]
    return {(int,): "integer", (float,): "number", (bool,): "boolean"}.get(tuple(parts), "yaml")


def from_form(values: dict[str, str], content: dict[str, Any]) -> dict[str, Any]:
    """A recipe's content: that of the YAML (which is changed), with the form's values in it."""
    kinds = {f["key"]: f["kind"] for f in fields()}
    method = values.get("method", "") or str(content.get("method", "lora"))
    kinds |= {f["key"]: f["kind"] for f in option_fields(method)}
    if method != str(content.get("method", "lora")):
        content.pop("method_options", None)  # another method's
    for key, kind in kinds.items():
        if key in values:
            put(content, key, values[key].strip(), kind)
    return content


def put(content: dict[str, Any], key: str, text: str, kind: str) -> None:
    """Set a key of nested values, or take it out where the text is empty, with a section that is empty then."""
    section, _, name = key.rpartition(".")
    place = content.setdefault(section, {}) if section else content
    if not isinstance(place, dict):
        place = content[section] = {}
    place.pop(name, None) if not text else place.update({name: value_of(text, kind)})
    if section and not place:
        del content[section]


def value_of(text: str, kind: str) -> Any:
    """What a text in the form means. One that is no YAML stays a text, for the recipe's check to refuse."""
    if kind == "text":
        return text
    try:
        return load_yaml(text)
    except yaml.YAMLError:
        return text


def read(text: str) -> tuple[dict[str, Any], str]:
    """The content of a YAML text, and what is wrong with it."""
    try:
        found = load_yaml(text)
    except yaml.YAMLError as error:
        return {}, f"not valid YAML: {error}"
    if found is None:
        return {}, ""
    return (found, "") if isinstance(found, dict) else ({}, f"expected keys and values, got {type(found).__name__}")


def written(content: dict[str, Any]) -> str:
    """A content as YAML; nothing where it is empty."""
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True) if content else ""


def flat(content: dict[str, Any]) -> dict[str, str]:
    """A form's texts for a content."""
    found: dict[str, str] = {}
    for key, value in content.items():
        if key in ("data", "training", "method_options") and isinstance(value, dict):
            found |= {f"{key}.{name}": text_of(inner) for name, inner in value.items()}
        else:
            found[str(key)] = text_of(value)
    return found


def text_of(value: Any) -> str:
    """A value as it is typed into a form."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).replace("\n...\n", "").strip()


def problems(content: dict[str, Any]) -> list[dict[str, str]]:
    """What the recipe's own checks say, each with the key that it is about ("" for none)."""
    try:
        Recipe.from_dict(content)
    except RecipeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        return [{"key": line.partition(": ")[0] if ": " in line else "", "text": line} for line in lines]
    return []


def apart(contents: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """What keeps recipes, the first of which is being written, from training together."""
    from ..training import Together

    made = Together(quiet=True)
    if contents[0] in contents[1:]:
        return [{"key": "", "text": "The same recipe is among those that train together already; change it first."}]
    try:
        for number, content in enumerate([*contents[1:], contents[0]], 1):
            made.add(Recipe.from_dict(content | {"output_dir": f"recipe {number}"}))
    except RecipeError as error:
        return [{"key": "", "text": str(error)}]
    return []
