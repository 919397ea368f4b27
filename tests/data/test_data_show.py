"""The random look: what is shown, with and without colour."""

import io

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from rich.console import Console

from graftlm.data import load_data, prepare, show
from graftlm.errors import DataError


def printed(renderable, **options) -> str:
    console = Console(file=io.StringIO(), width=200, **options)
    console.print(renderable)
    return console.file.getvalue()


def test_raw_rows_are_a_table_with_class_names():
    text = printed(show(load_data("tweets", split="train"), n=2))
    assert "2 of 50 rows" in text and "Tweet text" in text and "complaint" in text
    assert text == printed(show(load_data("tweets", split="train"), n=2))
    assert text != printed(show(load_data("tweets", split="train"), n=2, seed=1))


def test_lists_of_classes_conversations_and_markup():
    features = Features({"tags": List(ClassLabel(names=["x_ray", "yes"])), "text": Value("string")})
    data = Dataset.from_list([{"tags": [1, 0], "text": "[bold]not markup[/bold]"}], features=features)
    text = printed(show(data))
    assert "yes, x_ray" in text and "[bold]not markup[/bold]" in text
    chat = Dataset.from_list([{"messages": [{"role": "user", "content": "hello"}]}])
    assert "user: hello" in printed(show(chat))


def test_prepared_rows_without_colour(tokenizer):
    data = prepare(load_data("tweets", split="train[:1]"), tokenizer, max_length=120, padding="max_length")
    text = printed(show(data, tokenizer))
    pads = data[0]["attention_mask"].count(0)
    assert pads > 0 and f"<pad>×{pads}Tweet text : " in text
    assert " Label : ⟦" in text and "complaint<pad>⟧" in text


def test_prepared_rows_with_colour(tokenizer):
    data = prepare(load_data("alpaca-zh", split="train[:1]"), tokenizer)
    text = printed(show(data, tokenizer), force_terminal=True, color_system="standard")
    assert "\x1b[2mHuman: " in text and "\x1b[1;32m⟦" in text


def test_encoder_decoder_rows_and_splits(t5_tokenizer):
    data = prepare(load_data("tweets"), t5_tokenizer, seq2seq=True, max_length=99)
    text = printed(show(data, t5_tokenizer, n=1))
    assert "train: 1 of 50 rows" in text and "test: 1 of 200 rows" in text
    assert "Label : </s>" in text and ("⟦complaint</s>⟧" in text or "⟦no complaint</s>⟧" in text)


def test_generation_rows(tokenizer):
    data = prepare(load_data("tweets", split="train"), tokenizer, for_generation=True)
    assert "⟦" not in printed(show(data, tokenizer, n=1))


def test_fewer_rows_than_asked_for_and_mistakes(tokenizer):
    data = load_data("quotes", split="train[:2]")
    assert "2 of 2 rows" in printed(show(data, n=9))
    with pytest.raises(DataError, match="n=0"):
        show(data, n=0)
    with pytest.raises(DataError, match="pass the tokenizer"):
        show(prepare(data, tokenizer))
