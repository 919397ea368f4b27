"""Text token by token: put together it is the whole text, and no part of a character is ever given out."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
from chatglm_files import sentencepiece_model
from transformers import AutoTokenizer

from graftlm.architectures.chatglm_tokenizer import ChatGLMTokenizer
from graftlm.bundled import base_path
from graftlm.inference.detokenize import Detokenizer
from graftlm.inference.text import cut

TEXTS = [
    "你好，世界！请用一句话介绍你自己。😀👩‍👩‍👧🇩🇪 done.",
    "naïve café — “quotes” … and\n\n  indented\tcode(x): return x+1",
    "مرحبا بالعالم привет мир こんにちは 𝔘𝔫𝔦 🤷🏽‍♂️",
    "   leading, and trailing spaces   ",
    "Just plain words , and a comma .",
]


@cache
def tokenizer(name: str) -> Any:
    return AutoTokenizer.from_pretrained(base_path())


def sentencepiece(tmp_path: Any) -> Any:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model())
    return ChatGLMTokenizer(str(path))


@pytest.fixture(params=["bytes", "sentencepiece"])
def tokens(request: Any, tmp_path: Any) -> Any:
    return tokenizer("bytes") if request.param == "bytes" else sentencepiece(tmp_path)


@pytest.mark.parametrize("text", TEXTS)
def test_parts_make_the_whole(tokens: Any, text: str) -> None:
    ids = tokens(text, add_special_tokens=False)["input_ids"]
    made = Detokenizer(tokens)
    parts = [made.add(i) for i in ids]
    assert all("\ufffd" not in part for part in parts)
    assert "".join(parts) + made.end() == tokens.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert len([p for p in parts if p]) > len(ids) // 4  # it does stream


@pytest.mark.parametrize("seed", range(20))
def test_any_tokens_come_to_an_end(tokens: Any, seed: int) -> None:
    """Random tokens, most of which are no text at all."""
    rng = random.Random(seed)
    ids = [rng.randrange(3, len(tokens)) for _ in range(60)] + tokens("終わり🙂", add_special_tokens=False)["input_ids"]
    made = Detokenizer(tokens)
    text = "".join([made.add(i) for i in ids]) + made.end()
    assert text.endswith("終わり🙂")
    assert text == tokens.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_a_character_cut_off_is_given_out_at_the_end(tokens: Any) -> None:
    ids = tokens("ok 🙂", add_special_tokens=False)["input_ids"][:-1]
    made = Detokenizer(tokens)
    parts = [made.add(i) for i in ids]
    assert "\ufffd" not in "".join(parts) and made.end().startswith("\ufffd")


@pytest.mark.parametrize("stop", [["stop"], ["lo wor", "xx"], ["你好", "\n\n"], ["o", "xx"], ["aab"], ["never there"]])
def test_stop_texts_across_tokens(stop: list[str]) -> None:
    """Whatever the borders of tokens, what comes out is the text before the first of the stop texts."""
    names = tokenizer("bytes")
    rng = random.Random(1)
    for _ in range(60):
        text = "".join(rng.choice(["aaab", "hello world", " stop", "你好", "\n", "xx", "🙂", " lo"]) for _ in range(6))
        ids = names(text)["input_ids"]
        if rng.random() < 0.5:  # letter by letter
            ids = [i for c in text for i in names(c)["input_ids"]]
        made, out = Detokenizer(names, stop), []
        for i in ids:
            out.append(made.add(i))
            assert "".join(out) == cut(text, stop)[: len("".join(out))]
            if made.stopped:
                break
        whole = "".join(out) + made.end()
        assert whole == cut(text, stop)
        assert (made.stopped in stop) == (whole != text) or not text.startswith(whole + (made.stopped or "?"))


def test_stop_texts_that_are_not_heeded_yet() -> None:
    names = tokenizer("bytes")
    made = Detokenizer(names, ["ab"])
    first = names("ab")["input_ids"]
    out = "".join(made.add(i, heed=False) for i in first)
    assert out == "ab" and made.stopped is None
    out = "".join(made.add(i) for i in names("cab")["input_ids"])
    assert (out, made.stopped) == ("c", "ab")
