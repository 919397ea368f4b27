"""What single tokens stand for: their text and their bytes (a character may be spread over several tokens)."""

from __future__ import annotations

import functools
import re
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # as sentencepiece spells a byte


class Spelling:
    """A tokenizer's tokens one by one."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        self.byte_level = "ByteLevel" in repr(decoder)
        self.of = functools.lru_cache(maxsize=65_536)(self._of)

    def _of(self, token: int) -> tuple[str, bytes]:
        """Text and bytes of a token id."""
        name = self.tokenizer.convert_ids_to_tokens(token)
        if name is None:
            return "", b""
        if token in self.tokenizer.added_tokens_decoder:
            return name, name.encode()
        if self.byte_level and all(letter in self.letters for letter in name):
            data = bytes(self.letters[letter] for letter in name)
        elif match := _BYTE.fullmatch(name):
            data = bytes([int(match[1], 16)])
        else:
            data = name.replace("▁", " ").encode()
        return data.decode("utf-8", "replace"), data
