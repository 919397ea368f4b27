"""From messages or texts to the token ids that go in."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data.chat import chat_prompt_ids, render_chat
from ..errors import DataError
from .errors import ApiError
from .schema import Message
from .tools import instruction, spelled_out

#: what `apply_chat_template` is told, and what it tells templates, is no client's to set
ARGUMENTS = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
RESERVED = frozenset(ARGUMENTS) - {"documents"} | {"messages"}


class Prompts:
    """A base's tokenizer, as requests use it. The chat template is the base's own: one in an adapter's folder is never run.

    Args:
        tokenizer: the base's.
        vocabulary: how many ids the base knows.
    """

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self._knows_tools: bool | None = None

    def of_text(self, given: str | Sequence[int], special: bool = True) -> list[int]:
        """Ids of a text, or ids that were given, checked."""
        if isinstance(given, str):
            found = list(self.tokenizer(whole(given), add_special_tokens=special)["input_ids"])
        else:
            found = list(given)
            wrong = next((i for i in found if i >= self.vocabulary), None)
            if wrong is not None:
                raise ApiError(
                    400, f"token id {wrong} is not in the vocabulary (0 to {self.vocabulary - 1})", param="prompt"
                )
        if not found:
            start = self.tokenizer.bos_token_id
            found = [self.tokenizer.eos_token_id if start is None else start]
        if found[0] is None:
            raise ApiError(400, "the prompt is empty, and this tokenizer has no token to begin a text with", param="prompt")
        return found

    def text(self, ids: Sequence[int]) -> str:
        """A text as it was before it was cut into tokens, but for special ones."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def of_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] = (),
        options: dict[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Ids of a conversation through the chat template, ready for the assistant's turn."""
        plain = [self._plain(message) for message in messages]
        if taken := sorted(RESERVED & set(options or {})):
            raise ApiError(
                400, f"chat_template_kwargs cannot set {', '.join(taken)}: only what the base's template itself asks for",
                param="chat_template_kwargs",
            )  # fmt: skip
        uses = tools or any(m.tool_calls or m.role == "tool" for m in messages)
        if uses and not self.knows_tools:
            plain = spelled_out(plain)
            if tools:
                first = plain.pop(0)["content"] + "\n\n" if plain[0]["role"] == "system" else ""
                plain.insert(0, {"role": "system", "content": first + instruction(tools)})
            tools = ()
        try:
            if not tools and not options and add_generation_prompt:
                return chat_prompt_ids(plain, self.tokenizer)
            return self._rendered(plain, tools, options or {}, add_generation_prompt)
        except DataError as error:
            raise ApiError(400, str(error), param="messages") from error

    def _rendered(self, plain: list[dict], tools: Sequence[dict], options: dict[str, Any], ready: bool) -> list[int]:
        if not self.tokenizer.chat_template:
            if options:
                raise ApiError(400, "chat_template_kwargs: the base has no chat template", param="chat_template_kwargs")
            text = render_chat(plain, self.tokenizer)
            return self.of_text(text if ready else text.removesuffix("Assistant: "))
        try:
            made = self.tokenizer.apply_chat_template(
                plain, tools=list(tools) or None, add_generation_prompt=ready, return_dict=True, **options
            )
        except Exception as error:  # templates raise their own errors, e.g. on the order of roles
            raise ApiError(400, f"the base's chat template refused the conversation: {error}", param="messages") from error
        return list(made["input_ids"])

    def _plain(self, message: Message) -> dict[str, Any]:
        role = "system" if message.role == "developer" else message.role
        made: dict[str, Any] = {"role": role, "content": whole(message.text)}
        if message.tool_calls:
            made["tool_calls"] = [
                {
                    "id": c.id,
                    "type": "function",
                    "function": {"name": c.function.name, "arguments": _loaded(c.function.arguments)},
                }
                for c in message.tool_calls
            ]
        if message.tool_call_id is not None:
            made["tool_call_id"] = message.tool_call_id
        if message.name is not None:
            made["name"] = message.name
        return made

    @property
    def knows_tools(self) -> bool:
        """Whether the chat template says anything of tools: found out by rendering with and without one."""
        if self._knows_tools is None:
            self._knows_tools = bool(self.tokenizer.chat_template) and self._differs()
        return self._knows_tools

    def _differs(self) -> bool:
        tool = {"type": "function", "function": {"name": "probe_1", "description": "?", "parameters": {"type": "object"}}}
        said = [{"role": "user", "content": "?"}]
        try:
            texts = [self.tokenizer.apply_chat_template(said, tools=t, tokenize=False) for t in (None, [tool])]
        except Exception:  # a template that cannot render one question cannot be asked for more
            return False
        return texts[0] != texts[1]


def whole(text: str) -> str:
    """A text; an error where it holds half a character, which JSON can (a lone surrogate) and tokenizers do not take."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ApiError(400, f"the text holds half a character (a lone surrogate) at place {error.start}") from error
    return text


def _loaded(arguments: str | dict[str, Any]) -> Any:
    """Templates write arguments from objects; clients send them as JSON text."""
    if isinstance(arguments, dict):
        return arguments
    try:
        return json.loads(arguments)
    except json.JSONDecodeError as error:
        raise ApiError(400, f"a tool call's arguments are no JSON: {error}", param="messages") from error
