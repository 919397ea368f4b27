r"""Conversations: ``messages`` of ``{"role", "content"}`` through the tokenizer's chat template.

ShareGPT's ``conversations`` of ``{"from", "value"}`` are the same with other names (`ROLES`), with the system's words in a
column of their own or in the conversation.

Labels are on the assistant's turns only. How they are found:

1. The template marks them with ``{% generation %}``: transformers returns the mask.
2. Otherwise turn by turn. With ``T(k)`` the tokens of the first k messages and ``T(k)+`` those with the
   generation prompt, the tokens of assistant message k are what ``T(k+1)`` has more than ``T(k)+``. That
   holds only when each is a prefix of the next and of the whole; else (a template that rewrites earlier
   turns) DataError.
3. The tokenizer has no template: a plain one, which for one question is the Alpaca layout of document 003:

       System: {content}\n\nHuman: {content}\n\nAssistant: {content}{eos}Human: …

A template also says how an answer ends. ChatGLM3's says nothing: there the next role's token ends it, or the
end token after the last answer. `ChatFormat` labels those (`answer_end_ids` of our ChatGLMTokenizer).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from graftlm.data._base import Format, optional_text
from graftlm.data._pair import IGNORE_INDEX, Pair
from graftlm.errors import DataError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from graftlm.data._tokens import Tokens

Message = Mapping[str, Any]
_PLAIN_NAMES = {"system": "System: ", "user": "Human: "}
COLUMNS = "messages", "conversations"  # that hold conversations, the first that is there
ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "user": "user",
    "assistant": "assistant", "system": "system", "tool": "tool", "observation": "tool",
}  # fmt: skip
"""Names of speakers (`from`) by the roles of templates."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, kw_only=True)
class ChatFormat(Format):
    """A conversation in one column of messages; the loss is on what the assistant says, and on how it ends.

    A template decides how an answer ends; ``end`` is for tokenizers without one. What stands in ``system_column`` comes
    first, where the conversation has no system message itself.
    """

    name: ClassVar[str] = "chat"
    optional: ClassVar[frozenset[str]] = frozenset({"system"})
    messages_column: str = "messages"
    system_column: str = "system"
    max_length: int = 1024

    @classmethod
    def match(cls, columns: Iterable[str]) -> ChatFormat | None:
        have = set(columns)
        found = next((c for c in COLUMNS if c in have), None)
        return cls(messages_column=found) if found else None

    def pair(self, example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None = None) -> Pair:
        """All up to the last assistant message is the prompt, that message the answer."""
        messages = self._messages(example)
        if messages[-1]["role"] != "assistant":
            raise DataError(f"the conversation ends with role {messages[-1]['role']!r}, expected 'assistant'")
        prompt, target = render_chat(messages[:-1], tokenizer), messages[-1]["content"]
        if tokenizer is None or not tokenizer.chat_template:
            return Pair(prompt=prompt, target=target)
        ids = chat_prompt_ids(messages[:-1], tokenizer)
        return Pair(prompt=prompt, target=target, special_tokens=False, prompt_ids=tuple(ids))

    def encode(self, example: Mapping[str, Any], tokens: Tokens) -> tuple[list[int], list[int]]:
        messages = self._messages(example)
        if not tokens.tokenizer.chat_template:
            return self._encode_plain(messages, tokens)
        ids, mask = _with_ends(*chat_ids_and_mask(messages, tokens.tokenizer), tokens.tokenizer)
        return ids, [token if kept else IGNORE_INDEX for token, kept in zip(ids, mask, strict=True)]

    def _encode_plain(self, messages: list[dict], tokens: Tokens) -> tuple[list[int], list[int]]:
        ids, labels = list(tokens.prefix), [IGNORE_INDEX] * len(tokens.prefix)
        masked = ""
        for message in messages:
            if message["role"] != "assistant":
                masked += _plain_turn(message)
                continue
            question = tokens.plain(masked + "Assistant: ")
            answer = tokens.plain(message["content"]) + tokens.tail(self.end)
            ids += question + answer
            labels += [IGNORE_INDEX] * len(question) + answer
            masked = ""
        return ids, labels

    def _messages(self, example: Mapping[str, Any]) -> list[dict]:
        messages = example[self.messages_column]
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            raise DataError(
                f"column {self.messages_column!r} should hold a list of {{role, content}} or {{from, value}}, "
                f"got {messages!r}"
            )
        found = [turn(i, message) for i, message in enumerate(messages)]
        system = optional_text(example, self.system_column)
        if system.strip() and all(message["role"] != "system" for message in found):
            found.insert(0, {"role": "system", "content": system})
        return found


def turn(number: int, message: Any) -> dict:
    """A message of a conversation with the names of templates; fields without a value are left out.

    Raises:
        DataError: no text, or a speaker that is none of `ROLES`.
    """
    given = {k: v for k, v in message.items() if v is not None} if isinstance(message, Mapping) else {}
    if "role" not in given and isinstance(given.get("from"), str):
        speaker, text = given.pop("from"), given.pop("value", None)
        if speaker not in ROLES:
            raise DataError(
                f"message {number} is from {speaker!r}, expected one of {', '.join(ROLES)}{nearest(speaker, ROLES)}"
            )
        given = {"role": ROLES[speaker], "content": text} | given
    if not isinstance(given.get("role"), str) or not isinstance(given.get("content"), str):
        raise DataError(
            f"message {number} should have a text 'role' and a text 'content' (or 'from' and 'value'), got {message!r}"
        )
    return given


def render_chat(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """The conversation as text, ready for the assistant's next turn.

    Uses the tokenizer's chat template, or the plain one where it has none (or without a tokenizer). The text
    from a template holds its own special tokens: encode it with ``add_special_tokens=False``.
    """
    if tokenizer is not None and tokenizer.chat_template:
        return str(_apply(tokenizer, messages, add_generation_prompt=True, tokenize=False))
    eos = "" if tokenizer is None else tokenizer.eos_token or ""
    turns = [f"Assistant: {m['content']}{eos}" if m["role"] == "assistant" else _plain_turn(m) for m in messages]
    return "".join(turns) + "Assistant: "


def chat_prompt_ids(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids [T] of the conversation, ready for the assistant's next turn; `render_chat` is the same as text.

    By the template's own way to ids, in which a tokenizer can tell its tokens from their names in a text.
    """
    if tokenizer.chat_template:
        return list(_apply(tokenizer, messages, add_generation_prompt=True, return_dict=True)["input_ids"])
    return list(tokenizer(render_chat(messages, tokenizer))["input_ids"])


def chat_ids_and_mask(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids [T] of a conversation by the tokenizer's template, and 1 for each of the assistant's [T]."""
    if _GENERATION.search(str(tokenizer.get_chat_template())):
        out = _apply(tokenizer, messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = list(out["input_ids"]), list(out["assistant_masks"])
    else:
        ids, mask = _mask_by_prefixes(messages, tokenizer)
    return ids, mask


def _mask_by_prefixes(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    def encode(k: int, generation_prompt: bool) -> list[int]:
        if k == 0 and not generation_prompt:
            return []
        out = _apply(tokenizer, messages[:k], add_generation_prompt=generation_prompt, return_dict=True)
        return list(out["input_ids"])

    ids = encode(len(messages), False)
    mask = [0] * len(ids)
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = encode(k, True), encode(k + 1, False)
        if after[: len(before)] != before or ids[: len(after)] != after:
            raise DataError(
                f"the chat template does not build the conversation turn by turn: the tokens up to message "
                f"{k} (assistant) are not the beginning of the whole, so its labels cannot be told. Use one "
                "that marks answers with {% generation %} … {% endgeneration %}, or one answer per example"
            )
        mask[len(before) : len(after)] = [1] * (len(after) - len(before))
    return ids, mask


def _with_ends(ids: list[int], mask: list[int], tokenizer: Any) -> tuple[list[int], list[int]]:
    """The same with the token after each answer labelled, where the tokenizer tells ends that its template lacks."""
    ends = getattr(tokenizer, "answer_end_ids", None)
    if not ends:
        return ids, mask
    follows = [0, *mask[:-1]]
    labelled = [int(own or (before and token in ends)) for token, own, before in zip(ids, mask, follows, strict=True)]
    return (ids + [tokenizer.eos_token_id], labelled + [1]) if mask[-1] else (ids, labelled)


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **options: Any) -> Any:
    if not messages:
        raise DataError("the conversation starts with the assistant, but this chat template needs a message before")
    try:
        return tokenizer.apply_chat_template([dict(m) for m in messages], **options)
    except Exception as error:  # templates raise their own errors, e.g. on the order of roles
        raise DataError(f"the tokenizer's chat template refused the conversation: {error}") from error


def _plain_turn(message: Message) -> str:
    name = _PLAIN_NAMES.get(message["role"])
    if name is None or set(message) - {"role", "content"}:
        raise DataError(
            "the tokenizer has no chat template, and the plain one knows only system, user and assistant "
            f"with 'role' and 'content'; got {dict(message)!r}. Set tokenizer.chat_template"
        )
    return f"{name}{message['content']}".strip() + "\n\n"
