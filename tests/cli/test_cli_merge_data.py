"""`graftlm merge` and `graftlm data show`."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from graftlm import PeftModel


def test_merged_model_is_plain_and_the_same(cli, base, adapters, tmp_path):
    result = cli("merge", "-b", base, "-a", adapters["lora"], "-o", tmp_path / "merged")
    assert result.exit_code == 0, result.output
    assert "largest difference" in result.stdout
    ids = torch.tensor([[5, 9, 100, 7]])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters["lora"])
    assert torch.allclose(merged(ids).logits, wrapped(ids).logits, atol=1e-5)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


@pytest.mark.parametrize("name", ["prompt", "ptuning", "bottleneck"])
def test_methods_without_a_merge(cli, adapters, tmp_path, name):
    result = cli("merge", "-a", adapters[name], "-o", tmp_path / "merged")
    assert result.exit_code == 2
    assert "cannot be merged" in result.stderr
    assert not (tmp_path / "merged").exists()


def test_what_merge_refuses(cli, adapters, tmp_path):
    (tmp_path / "something").write_text("kept")
    full = cli("merge", "-a", adapters["lora"], "-o", tmp_path)
    assert full.exit_code == 2 and "not an empty directory" in full.stderr
    dtype = cli("merge", "-a", adapters["lora"], "-o", tmp_path / "x", "--dtype", "float23")
    assert dtype.exit_code == 2 and "float32" in dtype.stderr
    gone = cli("merge", "-a", adapters["lora"], "-b", tmp_path / "nowhere", "-o", tmp_path / "x")
    assert gone.exit_code == 2
    assert cli("merge", "-a", tmp_path / "nowhere", "-o", tmp_path / "x").exit_code == 2


def test_data_show(cli, base):
    result = cli("data", "show", "tweets", "-n", "1", "-t", base, "--split", "train")
    assert result.exit_code == 0, result.output
    assert "Tweet text" in result.stdout and "⟦" in result.stdout
    again = cli("data", "show", "tweets", "-n", "1", "-t", base, "--split", "train")
    assert again.stdout == result.stdout


def test_data_show_of_a_file(cli, base, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"question": "one", "answer": "two"}\n')
    options = ["--format", "completion", "--column", "prompt=question", "--column", "completion=answer", "-t", base]
    shown = cli("data", "show", path, *options)
    assert shown.exit_code == 0, shown.output
    assert "⟦two" in shown.stdout
    assert "⟦" not in cli("data", "show", path, "--raw").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["twets"], "tweets"),
        (["nowhere.csv"], "no such file"),
        (["tweets", "--split", "trian"], "train"),
        (["tweets", "--column", "text"], "ROLE=COLUMN"),
        (["tweets", "--format", "lable"], "label"),
        (["tweets", "-n", "0"], "at least one"),
        (["tweets", "-t", "./nowhere"], "no tokenizer"),
    ],
)
def test_data_show_bad_input(cli, arguments, message):
    result = cli("data", "show", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
