"""The bundled data sets: sizes, columns, balance, no leaks from train to test."""

import json
import re
from importlib.resources import files

import datasets
import pytest

from graftlm.data import BUNDLED, get_format, load_data

SIZES = {
    "tweets": (50, 200),
    "prompts": (80, 20),
    "quotes": (160, 40),
    "alpaca-zh": (80, 20),
    "adgen-zh": (80, 20),
}
TEXT = {
    "tweets": "Tweet text",
    "prompts": "prompt",
    "quotes": "quote",
    "alpaca-zh": "output",
    "adgen-zh": "summary",
}


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z']+|[\u3400-\u9fff]", text.lower()))


@pytest.mark.parametrize("name", BUNDLED)
def test_sizes_columns_and_no_empty_texts(name):
    data = load_data(name)
    assert (len(data["train"]), len(data["test"])) == SIZES[name]
    assert data["train"].column_names == list(BUNDLED[name])
    for part in data.values():
        for row in part:
            assert all(row[c] not in (None, "", []) for c in part.column_names if c != "input")


@pytest.mark.parametrize("name", BUNDLED)
def test_no_test_row_is_near_a_train_row(name):
    data = load_data(name)
    train = [words(text) for text in data["train"][TEXT[name]]]
    for text in data["test"][TEXT[name]]:
        own = words(text)
        nearest = max(train, key=lambda other: len(own & other) / len(own | other))
        # answers such as "负面。" and short sums may repeat, sentences may not
        assert len(own) < 6 or len(own & nearest) / len(own | nearest) < 0.6, text


def test_texts_are_unique():
    for name in BUNDLED:
        data = load_data(name)
        texts = [str(row) for part in data.values() for row in part.remove_columns("ID" if name == "tweets" else [])]
        assert len(set(texts)) == len(texts)


def test_tweets_have_the_features_and_balance_of_raft():
    data = load_data("tweets")
    assert data["train"].features == datasets.Features(
        {
            "Tweet text": datasets.Value("string"),
            "ID": datasets.Value("int32"),
            "Label": datasets.ClassLabel(names=["Unlabeled", "complaint", "no complaint"]),
        }
    )
    for split, half in (("train", 25), ("test", 100)):
        labels = data[split]["Label"]
        assert (list(labels).count(1), list(labels).count(2)) == (half, half)
    ids = [*data["train"]["ID"], *data["test"]["ID"]]
    assert ids == list(range(250))


def test_readme_names_every_data_set_and_its_sizes():
    readme = (files("graftlm") / "assets" / "datasets" / "README.md").read_text(encoding="utf-8")
    for name, (train, test) in SIZES.items():
        row = next(line for line in readme.splitlines() if line.startswith(f"| `{name}`"))
        assert f"| {train}" in row and f"| {test}" in row


def test_files_are_plain_jsonl():
    for name in BUNDLED:
        for split in ("train", "test"):
            text = (files("graftlm") / "assets" / "datasets" / name / f"{split}.jsonl").read_text(encoding="utf-8")
            assert all(isinstance(json.loads(line), dict) for line in text.strip().split("\n"))


def test_each_is_recognised_by_its_columns():
    guessed = {name: get_format(available=columns).name for name, columns in BUNDLED.items()}
    assert guessed == {
        "tweets": "label",
        "prompts": "text",
        "quotes": "text",
        "alpaca-zh": "alpaca",
        "adgen-zh": "adgen",
    }
