"""Ollama's Modelfile for a GGUF file: where the model is, how a conversation is written, what ends an answer.

Ollama writes conversations by Go templates. A chat template of Jinja is recognised as one of a few known forms by what it
makes of a conversation; of any other one no guess is made.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

TALK = [
    {"role": "system", "content": "S1"},
    {"role": "user", "content": "U1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "U2"},
]


@dataclass(frozen=True, kw_only=True)
class Form:
    """A known way to write a conversation.

    Args:
        turn: text of a turn, of `{role}` and `{content}`.
        opening: what the assistant's turn begins with.
        go: the same as Ollama's template.
        stops: texts that end an answer.
    """

    name: str
    turn: dict[str, str]
    opening: str
    go: str
    stops: tuple[str, ...]

    def render(self, messages: list[dict[str, str]]) -> str:
        return "".join(self.turn[m["role"]].format(**m) for m in messages) + self.opening


def alike(turn: str) -> dict[str, str]:
    return dict.fromkeys(("system", "user", "assistant"), turn)


def go_of(turn: str, opening: str, end: str) -> str:
    """Ollama's template of turns that are written alike: all messages, then the opening.

    Without Go's `{{-`, which would take away the line breaks before it.
    """
    before, after = turn.split("{content}")
    said = before.format(role="{{ .Role }}") + "{{ .Content }}" + after
    return "{{ range .Messages }}" + said + "{{ end }}" + opening


CHATML = "<|im_start|>{role}\n{content}<|im_end|>\n"
LLAMA3 = "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"
ZEPHYR = "<|{role}|>\n{content}</s>\n"
PLAIN = {"system": "System: {content}\n\n", "user": "Human: {content}\n\n", "assistant": "Assistant: {content}{eos}"}
CHATML_START, LLAMA3_START = "<|im_start|>assistant\n", "<|start_header_id|>assistant<|end_header_id|>\n\n"
FORMS = (
    Form(
        name="ChatML", turn=alike(CHATML), opening=CHATML_START, go=go_of(CHATML, CHATML_START, "<|im_end|>"),
        stops=("<|im_end|>", "<|im_start|>"),
    ),
    Form(
        name="Llama 3", turn=alike(LLAMA3), opening=LLAMA3_START, go=go_of(LLAMA3, LLAMA3_START, "<|eot_id|>"),
        stops=("<|eot_id|>", "<|start_header_id|>"),
    ),
    Form(
        name="Zephyr", turn=alike(ZEPHYR), opening="<|assistant|>\n", go=go_of(ZEPHYR, "<|assistant|>\n", "</s>"),
        stops=("</s>", "<|user|>"),
    ),
)  # fmt: skip


def plain(eos: str) -> Form:
    """How GraftLM writes conversations for tokenizers without a chat template."""
    go = (
        '{{ range .Messages }}{{ if eq .Role "system" }}System: {{ .Content }}\n\n'
        '{{ else if eq .Role "user" }}Human: {{ .Content }}\n\n'
        "{{ else }}Assistant: {{ .Content }}" + eos + "{{ end }}{{ end }}Assistant: "
    )
    turn = PLAIN | {"assistant": PLAIN["assistant"].replace("{eos}", eos)}
    return Form(name="plain", turn=turn, opening="Assistant: ", go=go, stops=("Human:",))


def recognised(tokenizer: Any) -> tuple[Form | None, str | None]:
    """The form of a tokenizer's conversations, None for an unknown one; and the system text that it sets by itself."""
    if not tokenizer.chat_template:
        return plain(tokenizer.eos_token or ""), None
    try:
        whole, without = (written(tokenizer, messages) for messages in (TALK, TALK[1:]))
    except Exception:  # a template refuses roles with errors of its own: then it is of none of these forms
        return None, None
    # llama.cpp sets the first token where the tokenizer does: then the template must begin with it, and only then
    adds, bos = adds_bos(tokenizer), tokenizer.bos_token or ""
    for first, form in itertools.product([bos] if adds else dict.fromkeys(["", bos]), FORMS):
        if first + form.render(TALK) != whole:
            continue
        found = form if adds else replace(form, go=first + form.go)
        rest = form.render(TALK[1:])
        if without == first + rest:
            return found, None
        before, after = form.turn["system"].format(role="system", content="\0").split("\0")
        before, after = first + before, after + rest
        if without.startswith(before) and without.endswith(after):
            return found, without[len(before) : len(without) - len(after)]
    return None, None


def written(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """A conversation up to the assistant's next turn, by the chat template."""
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def adds_bos(tokenizer: Any) -> bool:
    """Whether a text's first token is one that the tokenizer sets, as llama.cpp then does."""
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def modelfile(file: str, tokenizer: Any, context: int | None) -> tuple[str, str]:
    """The Modelfile's text for a GGUF file beside it, and a line about its template."""
    form, system = recognised(tokenizer)
    lines = [f"FROM ./{file}"]
    if form is None:
        note = (
            "The chat template is of no form that is known here: the Modelfile has no TEMPLATE. Ollama looks for one of its "
            "own by the template in the GGUF file, and writes bare prompts where it finds none; add TEMPLATE there."
        )
        lines.append("# TEMPLATE: the model's chat template (in the GGUF file) is of no known form")
    else:
        note = f"Conversations are written in the {form.name} form."
        lines.append(f'TEMPLATE """{form.go}"""')
        lines += [f'PARAMETER stop "{stop}"' for stop in form.stops]
    if system:
        lines.append(f'SYSTEM """{system}"""')
    if context:
        lines.append(f"PARAMETER num_ctx {context}")
    return "\n".join(lines) + "\n", note
