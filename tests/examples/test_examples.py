"""Every example runs as a user starts it, with tiny settings, and leaves an adapter that loads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from graftlm import PeftConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
DATA = Path(__file__).parents[2] / "src" / "graftlm" / "assets" / "datasets"


def run(script: str, *arguments: str, folder: Path) -> str:
    """Run an example in `folder`; returns what it printed."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "PYTHONIOENCODING": "utf-8",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def adapter(folder: Path) -> tuple[str, int]:
    """An adapter folder's method and number of kept parameters."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return PeftConfig.from_pretrained(folder).peft_type.value, sum(t.numel() for t in tensors.values())


def test_prefix_tweets(tmp_path):
    printed = run("prefix_tweets.py", "--epochs", "1", "--max-steps", "2", "--output", "out", folder=tmp_path)
    assert "\nBefore\n" in printed and "\nAfter\n" in printed and "epoch 0: train loss" in printed
    assert adapter(tmp_path / "out") == ("PREFIX_TUNING", 30 * 8 * 2 * 256)
    assert (tmp_path / "out" / "training_state.safetensors").is_file()


def test_prompt_two_adapters_with_data_of_ones_own(tmp_path):
    own = str(DATA / "prompts" / "test.jsonl")
    printed = run("prompt_two_adapters.py", "--max-steps", "2", "--data", own, "--output", "out", folder=tmp_path)
    assert "After (prompts)" in printed and "After (quotes)" in printed and "answers as before" in printed
    assert adapter(tmp_path / "out" / "prompts") == adapter(tmp_path / "out" / "quotes") == ("PROMPT_TUNING", 4 * 256)


@pytest.mark.parametrize("encoder", ["mlp", pytest.param("lstm", marks=pytest.mark.slow)])
def test_p_tuning_alpaca(tmp_path, encoder):
    printed = run("p_tuning_alpaca.py", "--encoder", encoder, "--max-steps", "2", "--output", "out", folder=tmp_path)
    assert "Before " in printed and "After " in printed and "Reference" in printed
    assert adapter(tmp_path / "out") == ("P_TUNING", 10 * 256)


@pytest.mark.parametrize("flag", [None, pytest.param("--load-in-8bit", marks=pytest.mark.slow)])
def test_lora_quotes(tmp_path, flag):
    printed = run("lora_quotes.py", "--max-steps", "2", "--output", "out", *filter(None, [flag]), folder=tmp_path)
    assert "MiB" in printed and "trainable params: 65,536 " in printed and "After " in printed
    assert adapter(tmp_path / "out") == ("LORA", 8 * 8 * (256 + 768))


@pytest.mark.parametrize("flag", [None, pytest.param("--load-in-4bit", marks=pytest.mark.slow)])
def test_qlora_adgen(tmp_path, flag):
    printed = run("qlora_adgen.py", "--max-steps", "2", "--output", "out", *filter(None, [flag]), folder=tmp_path)
    assert "MiB" in printed and "类型#" in printed and "After " in printed
    assert adapter(tmp_path / "out") == adapter(tmp_path / "out" / "checkpoint-2") == ("LORA", 8 * 4 * (256 + 768))
    if flag is None:
        run("qlora_adgen.py", "--max-steps", "3", "--output", "out", "--resume", "out/checkpoint-2", folder=tmp_path)
        assert (tmp_path / "out" / "checkpoint-3").is_dir()
