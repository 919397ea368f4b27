"""ChatGLM's SentencePiece tokenizer without remote code: that of chatglm3-6b and, but for chats, of chatglm2-6b.

Ids are the pieces of `tokenizer.model`, 0 ... n-1, then nine special tokens, n ... n+8, which stand in no file::

    one text     [gMASK] sop text
    two texts    [gMASK] sop question answer </s>
    a chat       [gMASK] sop <|user|> "\\n" "question" <|assistant|> "\\n" "answer" ... <|assistant|>

Every quoted part of a chat is encoded apart from its neighbours, which a rendered text could not say; so the template puts a
mark between a heading and its content, at which `tokenize` cuts.

A special token's name in a text stays text: nobody can write himself a role. `encode_special_tokens=True` (for one call,
transformers' `split_special_tokens=False`) turns names into tokens; in a chat only those of the template become tokens.
Decoding shows the nine special tokens (`skip_special_tokens=True` hides them). `<unk>`, `<s>`, `</s>` and ids without a
piece, which a model with a padded vocabulary can emit, have no text.

Differs from the published code: pads on either side (left is the default); `convert_ids_to_tokens` names ids 0 to 2; and
`position_ids` are returned only when `model_input_names` lists them. Models count positions from the attention mask, and
whoever joins or cuts `input_ids` (document 001 does) would leave stale positions behind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizer

from ..errors import UnsupportedError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

ROLES = ("system", "user", "assistant", "observation")
SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *(f"<|{role}|>" for role in ROLES))
_SPECIAL = re.compile("|".join(map(re.escape, SPECIAL)))
# Two characters that Unicode keeps out of texts: one breaks the names of special tokens in a chat's contents, one cuts.
_GUARD, _CUT = "\ufdd0", "\ufdd1"

CHAT_TEMPLATE = """\
[gMASK]sop
{%- if tools %}{{ raise_exception("expected tools as 'tools' of the system message, got them as an argument") }}{% endif %}
{%- for message in messages %}
{%- if message.role not in ['system', 'user', 'assistant', 'observation'] %}
{{- raise_exception("got role '" ~ message.role ~ "', expected system, user, assistant or observation") }}
{%- endif %}
{%- if message.content is not string %}
{{- raise_exception("message " ~ loop.index0 ~ " (" ~ message.role ~ ") has no text as its 'content'") }}
{%- endif %}
{{- '<|' ~ message.role ~ '|>' ~ (message.metadata or '') ~ '\\n' ~ (cut or ' ') ~ message.content }}
{%- if message.role == 'system' and message.tools is defined %}{{ '\\n' ~ message.tools | tojson(indent=4) }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
_PROBE = [{"role": role, "content": role} for role in reversed(ROLES)]


class ChatGLMTokenizer(PreTrainedTokenizer):
    """See the module.

    Args:
        vocab_file: a SentencePiece model with `<unk>`, `<s>` and `</s>`.
        encode_special_tokens: whether the nine special tokens' names in a text become those tokens.
        kwargs: what transformers' tokenizers take.

    Raises:
        UnsupportedError: no `tokenizer.model`, one of another kind (GLM-4's), or no sentencepiece.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": "tokenizer.model"}
    padding_side = "left"
    chat_template: Any

    def __init__(self, vocab_file: str | None = None, *, encode_special_tokens: bool = False, **kwargs: Any) -> None:
        self.vocab_file = vocab_file
        self.encode_special_tokens = encode_special_tokens
        self.sp_model = sp = _read_model(vocab_file, kwargs.get("name_or_path"))
        self._pieces = sp.get_piece_size()
        # A piece may be spelt like a special token; where tokens are texts, it bears another name.
        self._renamed = {name: f"{name} (piece)" for name in SPECIAL if sp.id_to_piece(sp.piece_to_id(name)) == name}
        self._given_back = {new: old for old, new in self._renamed.items()}
        self._special = {name: self._pieces + i for i, name in enumerate(SPECIAL)}
        self._special |= {new: sp.piece_to_id(old) for old, new in self._renamed.items()}
        unk, bos, eos = (sp.id_to_piece(i) for i in (sp.unk_id(), sp.bos_id(), sp.eos_id()))
        self._reserved = {*SPECIAL, unk, bos, eos}
        names = {"unk_token": unk, "bos_token": bos, "eos_token": eos, "pad_token": unk}
        kwargs = names | {key: value for key, value in kwargs.items() if value is not None} | self._own_tokens(kwargs)
        super().__init__(vocab_file=vocab_file, encode_special_tokens=encode_special_tokens, **kwargs)
        if "split_special_tokens" not in kwargs:
            self.split_special_tokens = None  # as encode_special_tokens says
        if self.chat_template is None or self._is_published(self.chat_template):
            self.chat_template = CHAT_TEMPLATE

    # ------------------------------------------------------------------------------------------------ the vocabulary

    @property
    def vocab_size(self) -> int:
        return self._pieces + len(SPECIAL)

    @property
    def all_special_tokens(self) -> list[str]:
        return list(dict.fromkeys([*super().all_special_tokens, *SPECIAL]))

    def get_vocab(self) -> dict[str, int]:
        return {self._convert_id_to_token(i): i for i in range(self.vocab_size)} | self._added_tokens_encoder

    def get_command(self, token: str) -> int:
        """The id of a special token, by its name or as <bos>, <eos>, <unk> or <pad>. ValueError for any other."""
        sp = self.sp_model
        ids = {"<bos>": sp.bos_id(), "<eos>": sp.eos_id(), "<unk>": sp.unk_id(), "<pad>": sp.unk_id()} | self._special
        if token not in ids or token in self._given_back:
            raise ValueError(f"{token!r} is no special token; expected one of {', '.join([*list(ids)[:4], *SPECIAL])}")
        return ids[token]

    def _add_tokens(self, new_tokens: Sequence[Any], special_tokens: bool = False) -> int:
        """Only tokens of the user's own are added: the others are there, and texts are not to be split at their names."""
        own = [token for token in new_tokens if str(token) not in self._reserved]
        return super()._add_tokens(own, special_tokens=special_tokens) if own else 0

    def _own_tokens(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The user's own among the added tokens of a saved tokenizer (some published files list special tokens there)."""
        found: dict[str, Any] = {}
        for key in ("extra_special_tokens", "additional_special_tokens"):
            if isinstance(given := kwargs.get(key), (list, tuple)):
                tokens = [AddedToken(**token) if isinstance(token, Mapping) else token for token in given]
                found[key] = [token for token in tokens if str(token) not in self._reserved]
        if added := kwargs.get("added_tokens_decoder"):
            found["added_tokens_decoder"] = {i: t for i, t in added.items() if str(t) not in self._reserved}
        return found

    def _convert_token_to_id(self, token: str) -> int:
        found = self._special.get(token)
        return self.sp_model.piece_to_id(token) if found is None else found

    def _convert_id_to_token(self, index: int) -> str:
        """The token of an id; an empty one for ids beyond the vocabulary."""
        if 0 <= index < self._pieces:
            piece = self.sp_model.id_to_piece(index)
            return self._renamed.get(piece, piece)
        return SPECIAL[index - self._pieces] if self._pieces <= index < self.vocab_size else ""

    # ------------------------------------------------------------------------------------------------ texts and ids

    def tokenize(
        self, text: str, *, split_special_tokens: bool | None = None, chat: bool = False, **kwargs: Any
    ) -> list[str]:
        """A text's tokens: added tokens, where asked for the special ones, and SentencePiece's pieces in between."""
        if split_special_tokens is None:
            split_special_tokens = self.split_special_tokens
        added = [] if split_special_tokens else self._added_tokens_decoder.values()
        names = {token.content: _pattern(token) for token in added}
        if split_special_tokens is False or (split_special_tokens is None and self.encode_special_tokens):
            names |= {name: f"({re.escape(name)})" for name in SPECIAL}
        pattern = "|".join(names[name] for name in sorted(names, key=len, reverse=True)) or "(?!)"
        tokens, end = [], 0
        for found in re.finditer(pattern, text):
            tokens += [*self._tokenize(text[end : found.start()], chat=chat), found[found.lastindex or 0]]
            end = found.end()
        return tokens + self._tokenize(text[end:], chat=chat)

    def _tokenize(self, text: str, chat: bool = False, **kwargs: Any) -> list[str]:
        """The pieces of a text. A chat is encoded in the parts that its marks make."""
        parts = text.replace(_GUARD, "").split(_CUT) if chat else [text]
        pieces = [piece for part in parts for piece in self.sp_model.encode(part, out_type=str)]
        return [self._renamed.get(piece, piece) for piece in pieces]

    def get_prefix_tokens(self) -> list[int]:
        """The ids of [gMASK] sop."""
        return [self._special["[gMASK]"], self._special["sop"]]

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: list[int] | None = None) -> list[int]:
        ids = self.get_prefix_tokens() + list(token_ids_0)
        return ids if token_ids_1 is None else [*ids, *token_ids_1, self.sp_model.eos_id()]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)
        mask = [1, 1] + [0] * len(token_ids_0)
        return mask if token_ids_1 is None else mask + [0] * len(token_ids_1) + [1]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.sp_model.decode_pieces([self._given_back.get(token, token) for token in tokens])

    def _decode(self, token_ids: int | list[int], skip_special_tokens: bool = False, **kwargs: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        silent = {self.sp_model.unk_id(), self.sp_model.bos_id(), self.sp_model.eos_id()}
        return super()._decode([i for i in ids if i not in silent], skip_special_tokens=skip_special_tokens, **kwargs)

    def _pad(self, encoded_inputs: Any, *args: Any, padding_side: str | None = None, **kwargs: Any) -> Any:
        """transformers' padding, of `position_ids` too: 0 ... T-1, and zeros on the padding."""
        if "position_ids" in self.model_input_names and "position_ids" not in encoded_inputs:
            encoded_inputs["position_ids"] = list(range(len(encoded_inputs["input_ids"])))
        padded = super()._pad(encoded_inputs, *args, padding_side=padding_side, **kwargs)
        if "position_ids" in padded:
            positions = list(padded["position_ids"])
            gap = [0] * (len(padded["input_ids"]) - len(positions))
            padded["position_ids"] = gap + positions if (padding_side or self.padding_side) == "left" else positions + gap
        return padded

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        name = self.vocab_files_names["vocab_file"]
        path = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        path.write_bytes(self.sp_model.serialized_model_proto())
        return (str(path),)

    # ------------------------------------------------------------------------------------------------ chats

    @property
    def answer_end_ids(self) -> list[int]:
        """With ChatGLM's own template: the tokens of which one follows an answer, though the template writes none."""
        own = self.chat_template == CHAT_TEMPLATE
        return [self.sp_model.eos_id(), self._special["<|user|>"], self._special["<|observation|>"]] if own else []

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Any = None,
        documents: Any = None,
        chat_template: str | None = None,
        *,
        tokenize: bool = True,
        sanitize_control_tokens: bool = True,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' method, for one chat or many. Names of special tokens in messages are always encoded as text.

        Messages have `role`, `content`, and may have `metadata` (the assistant's: a tool's name) and, in a system message,
        `tools`. As a text (`tokenize=False`) a chat cannot tell the template's tokens from names in messages.
        """
        if tokenize:
            conversation, tools, documents = _guarded(conversation), _guarded(tools), _guarded(documents)
            tokenizer_kwargs = {"split_special_tokens": False, "chat": True} | dict(tokenizer_kwargs or {})
            kwargs = {"cut": _CUT} | _guarded(kwargs)
        return super().apply_chat_template(
            conversation, tools, documents, chat_template, tokenize=tokenize, tokenizer_kwargs=tokenizer_kwargs, **kwargs
        )

    def build_single_message(self, role: str, metadata: str, message: str) -> list[int]:
        """A message's ids: its role, its heading and, encoded apart, its content."""
        message_ = {"role": role, "metadata": metadata, "content": message}
        ids = self.apply_chat_template([message_], chat_template=CHAT_TEMPLATE, return_dict=False)
        return ids[len(self.get_prefix_tokens()) :]

    def build_chat_input(self, query: str, history: Sequence[Mapping[str, Any]] | None = None, role: str = "user") -> Any:
        """What the model reads to answer a query: `input_ids` and `attention_mask`, tensors [1, T]."""
        messages = [*(history or []), {"role": role, "content": query}]
        options: dict[str, Any] = {"add_generation_prompt": True, "return_tensors": "pt"}
        return self.apply_chat_template(messages, chat_template=CHAT_TEMPLATE, **options)

    def _is_published(self, template: Any) -> bool:
        """Whether a template writes chats as ChatGLM3's do; revisions differ in a space before the line break."""
        try:
            theirs, ours = (
                self.apply_chat_template(_PROBE, chat_template=t, tokenize=False, add_generation_prompt=True)
                for t in (template, CHAT_TEMPLATE)
            )
        except Exception:  # whatever a template raises, or one that is no text
            return False
        return theirs.replace("|> \n", "|>\n") == ours


def register_tokenizer(config_class: type) -> None:
    """Tell `AutoTokenizer`. Repeatable.

    A folder's tokenizer_config.json names the class, or else `config_class` does. The class is not registered *for* the
    configuration: that would let a folder's remote code go first where `trust_remote_code=True`.
    """
    AutoTokenizer.register(_NoModel, ChatGLMTokenizer, exist_ok=True)
    config_class.tokenizer_class = ChatGLMTokenizer.__name__  # type: ignore[attr-defined]


class _NoModel:
    """Stands where `AutoTokenizer.register` wants a configuration."""


def _read_model(path: str | None, folder: Any) -> SentencePieceProcessor:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise UnsupportedError(
            f"ChatGLM's tokenizer needs sentencepiece, which cannot be imported ({error}). "
            "Install it: pip install sentencepiece"
        ) from error
    if path is None or not Path(path).is_file():
        raise UnsupportedError(
            f"ChatGLM's tokenizer is in a file tokenizer.model; {path or folder or 'what was given'} has none. "
            "Take the tokenizer files of zai-org/chatglm3-6b (ChatGLM-6B, version 1, has another tokenizer: ice_text.model)."
        )
    try:
        model = SentencePieceProcessor(model_file=str(path))
    except RuntimeError as error:
        raise UnsupportedError(
            f"{path} is not a SentencePiece model. GLM-4's tokenizer.model is tiktoken's, which is not implemented here: "
            "use a checkpoint that transformers has a class for, such as zai-org/glm-4-9b-chat-hf."
        ) from error
    if min(model.unk_id(), model.bos_id(), model.eos_id()) < 0:
        raise UnsupportedError(f"{path} lacks one of <unk>, <s> and </s>; expected ChatGLM's SentencePiece model.")
    return model


def _pattern(token: AddedToken) -> str:
    """A regular expression for an added token, itself in a group."""
    name = f"({re.escape(token.content)})"
    name = rf"(?<!\S){name}(?!\S)" if token.single_word else name
    return r"\s*" * token.lstrip + name + r"\s*" * token.rstrip


def _guarded(value: Any) -> Any:
    """The same messages with the names of special tokens broken, and without the marks."""
    value = getattr(value, "messages", value)
    if isinstance(value, str):
        plain = value.replace(_GUARD, "").replace(_CUT, "")
        return _SPECIAL.sub(lambda name: name[0][0] + _GUARD + name[0][1:], plain)
    if isinstance(value, Mapping):
        return {key: _guarded(item) for key, item in value.items()}
    return [_guarded(item) for item in value] if isinstance(value, (list, tuple)) else value
