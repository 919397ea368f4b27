"""A tokenizer as GGUF's metadata: tokens, their types, merges, the rule that splits texts, special ids, the chat template.

Byte-level BPE only. A file holds neither normaliser nor regular expression, just the name of a rule that llama.cpp knows:
the name is found by trying all known rules on texts that tell them apart (`PROBES`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ..errors import UnsupportedError
from ..gguf import known_splits, splitting

RULES = ("gpt-2", "smollm", "bloom")  # tried first; then those that transformers knows
FIRST = ("qwen2", "llama-bpe", "tekken", "gpt-4o")  # of those: the names that llama.cpp's converter writes itself
PROBES = (
    "Hello there, it's 12 345 o'clock; I'VE paid 1234567.89 €!",
    "  two spaces\t\ttabs\n\nlines\r\n   end   ",
    "你好，世界。北京2024年 тест ёлка naïve café ١٢٣ ²³ Ⅷ",
    "🙂🙂 👩‍👩‍👧 <html lang='en'> a_b-c/d\\e {x:[1,2]} (y|z) #tag @me ...!!??",
    "camelCaseHTTPServer DON'T don't we'll WE'LL \u00a0nbsp\u3000wide",
)
MEND = (
    "graftlm merge writes the model with its tokenizer as it is; llama.cpp's convert_hf_to_gguf.py, or a server that reads "
    "safetensors, takes that."
)


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What `tokenizer.ggml.*` holds."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    rule: str
    ids: dict[str, int]  # of bos, eos, unk, pad
    adds_bos: bool
    adds_eos: bool
    chat_template: str | None


def vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """A tokenizer's vocabulary, filled up to the `size` of the model's embeddings.

    Raises:
        UnsupportedError: it is no byte-level BPE, changes texts before it splits them, or splits them by no known rule.
    """
    state = json.loads(byte_level(tokenizer).to_str())
    tokens, types = tokens_of(tokenizer, state, size)
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]]
    ids = {k: getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "unk", "pad")}
    before, after = added_around(tokenizer)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return Vocabulary(
        tokens=tokens, types=types, merges=merges, rule=rule_of(tokenizer.backend_tokenizer.pre_tokenizer),
        ids={k: v for k, v in ids.items() if v is not None}, adds_bos=before, adds_eos=after, chat_template=template,
    )  # fmt: skip


def byte_level(tokenizer: Any) -> Any:
    """The tokenizer's backend, where a GGUF file can hold it; UnsupportedError otherwise."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedError(f"{type(tokenizer).__name__} has no fast form, from which its merges could be read. {MEND}")
    state = json.loads(backend.to_str())
    model, normalizer = state["model"], state["normalizer"]
    kind = model["type"]
    if kind != "BPE" or model.get("byte_fallback") or "ByteLevel" not in json.dumps(state["pre_tokenizer"]):
        raise UnsupportedError(
            f"The tokenizer is {kind} without bytes as its letters; only byte-level BPE is written. {MEND}"
        )
    unusual = [k for k in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(k)]
    if normalizer is not None and normalizer["type"] != "NFC":  # llama.cpp takes texts as they come
        unusual.append(f"normalizer {normalizer['type']}")
    if unusual:
        raise UnsupportedError(f"A GGUF file cannot hold the tokenizer's {', '.join(unusual)}. {MEND}")
    return backend


def tokens_of(tokenizer: Any, state: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Tokens and their types by id; what the embeddings have more is unused."""
    from gguf import TokenType

    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(TokenType.UNUSED)] * size
    known = {i: (t, TokenType.NORMAL) for t, i in state["model"]["vocab"].items()}
    for added in state["added_tokens"]:
        known[added["id"]] = (added["content"], TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    if max(known) >= size:
        raise UnsupportedError(
            f"The tokenizer has ids up to {max(known)}, the model's embeddings {size} rows. Resize the embeddings "
            "(model.resize_token_embeddings) or take the base's own tokenizer."
        )
    for i, (token, kind) in known.items():
        tokens[i], types[i] = token, int(kind)
    return tokens, types


def rule_of(pre_tokenizer: Any) -> str:
    """llama.cpp's name of a way to split texts."""
    wanted = [pre_tokenizer.pre_tokenize_str(text) for text in PROBES]
    for rule in dict.fromkeys((*RULES, *(r for r in FIRST if r in known_splits()), *known_splits())):
        known = splitting(rule)
        if [known.pre_tokenize_str(text) for text in PROBES] == wanted:
            return rule
    raise UnsupportedError(
        f"The tokenizer splits texts by none of the rules of llama.cpp that are known here ({', '.join(RULES)}, "
        f"{', '.join(known_splits())}): the tokens would be others. {MEND}"
    )


def added_around(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer sets its first token before a text, and its last one behind it."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    before = bool(full) and full[0] == tokenizer.bos_token_id and full != bare
    after = bool(full) and full[-1] == tokenizer.eos_token_id and full != bare
    if full != [tokenizer.bos_token_id] * before + bare + [tokenizer.eos_token_id] * after:
        raise UnsupportedError(f"The tokenizer makes {full} of 'a', not {bare} between its first and last token. {MEND}")
    return before, after
