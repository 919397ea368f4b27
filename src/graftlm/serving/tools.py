"""Functions that a model may call: into the prompt, and out of the text.

A base whose chat template knows tools renders them itself. One whose template does not (it renders the same with and without
them) gets a system message in the form that most open models are trained on, Hermes': schemas in ``<tools>``, calls as
``<tool_call>{"name": …, "arguments": {…}}</tool_call>``. Calls are read from that form, and from an answer that is nothing
but such an object or a list of them, as Llama 3 writes.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"

_INSTRUCTION = (
    "You may call functions to help with the user's request. Their signatures stand within <tools></tools>:\n"
    "<tools>\n{tools}\n</tools>\nTo call one, answer with a JSON object within <tool_call></tool_call>:\n"
    '<tool_call>\n{{"name": "function name", "arguments": {{…}}}}\n</tool_call>'
)


@dataclass(frozen=True)
class Call:
    """One call: the function's name, its arguments as JSON text."""

    name: str
    arguments: str

    def to_dict(self, index: int | None = None) -> dict[str, Any]:
        """In OpenAI's form, under an id of its own."""
        made: dict[str, Any] = {} if index is None else {"index": index}
        made |= {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
        return made | {"function": {"name": self.name, "arguments": self.arguments}}


def instruction(tools: Sequence[dict[str, Any]]) -> str:
    """What tells a model of functions where its chat template does not."""
    return _INSTRUCTION.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))


def spelled_out(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation's calls and their results as plain text, for a template that does not know them."""
    made = []
    for message in messages:
        text = message.get("content") or ""
        if calls := message.get("tool_calls"):
            blocks = [json.dumps(call["function"], ensure_ascii=False) for call in calls]
            text = "\n".join([text] * bool(text) + [f"{OPEN}\n{block}\n{CLOSE}" for block in blocks])
        if message["role"] == "tool":
            made.append({"role": "user", "content": f"<tool_response>\n{text}\n</tool_response>"})
        else:
            made.append({"role": message["role"], "content": text})
    return made


def call_schema(tools: Sequence[dict[str, Any]], name: str | None) -> dict[str, Any]:
    """A JSON schema that an answer must fit which is one call: of the function named, or of any."""
    functions = [tool["function"] for tool in tools if name in (None, tool["function"]["name"])]
    forms = [
        {
            "type": "object",
            "properties": {"name": {"const": f["name"]}, "arguments": f.get("parameters") or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for f in functions
    ]
    return forms[0] if len(forms) == 1 else {"anyOf": forms}


def read_calls(text: str, names: Sequence[str], most: int | None = None) -> tuple[str, list[Call]]:
    """What an answer says beside its calls, and these, or the first `most` of them. Text that is no call of a known function
    stays text."""
    said, calls, rest = "", [], text
    while (start := rest.find(OPEN)) >= 0:
        inside, _, after = rest[start + len(OPEN) :].partition(CLOSE)
        if not (found := _objects(inside, names)):
            return text, []
        said += rest[:start]
        calls += found
        rest = after
    if not calls and (found := _objects(text, names)):
        return "", found[:most]
    return (said + rest).strip() if calls else text, calls[:most]


def may_be_call(text: str) -> int:
    """How much of a text that is still being written is surely no part of a call."""
    stripped = text.lstrip()
    if not stripped or stripped[0] in "{[":
        return 0
    if (start := text.find(OPEN)) >= 0:
        return start
    held = next((n for n in range(min(len(OPEN) - 1, len(text)), 0, -1) if text.endswith(OPEN[:n])), 0)
    return len(text) - held


def _objects(text: str, names: Sequence[str]) -> list[Call]:
    """The calls in a text that is nothing but one JSON value, or several on lines; none where anything else is there."""
    decoder, found, at = json.JSONDecoder(), [], 0
    text = text.strip()
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            return []
        found += value if isinstance(value, list) else [value]
        while at < len(text) and text[at] in " \t\r\n;,":
            at += 1
    calls = [_call(value, names) for value in found]
    return [call for call in calls if call] if all(calls) else []


def _call(value: Any, names: Sequence[str]) -> Call | None:
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    given = value.get("arguments", value.get("parameters", {}))
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except json.JSONDecodeError:
            return None
    return Call(value["name"], json.dumps(given, ensure_ascii=False)) if isinstance(given, dict) else None
