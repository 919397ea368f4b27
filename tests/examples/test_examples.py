"""Every example runs as a user starts it, with tiny settings, and leaves an adapter that loads."""

import contextlib
import io
import logging
import os
import runpy
import subprocess
import sys
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from safetensors.torch import load_file

from graftlm import PeftConfig
from graftlm.files import header_of

EXAMPLES = Path(__file__).parents[2] / "examples"
DATA = Path(__file__).parents[2] / "src" / "graftlm" / "assets" / "datasets"


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """In a folder of its own, with its own cache, without the network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(logging.getLogger("bitsandbytes"), "level", logging.NOTSET)


def run(script: str, *arguments: str) -> str:
    """Run an example in this process, as `python script.py …` would; returns what it printed."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    return printed.getvalue()


def started(script: str, *arguments: str, folder: Path) -> str:
    """The same in a process of its own: eight seconds of imports, so one of them is enough."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | offline, capture_output=True, text=True, encoding="utf-8", timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def adapter(folder: Path) -> tuple[str, int]:
    """An adapter folder's method and number of kept parameters."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return PeftConfig.from_pretrained(folder).peft_type.value, sum(t.numel() for t in tensors.values())


def form(folder: Path) -> str:
    """The form of the base that an adapter was trained over."""
    return header_of(folder / "adapter_model.safetensors")["base"]["form"]


def test_prefix_tweets(tmp_path):
    printed = started("prefix_tweets.py", "--epochs", "1", "--max-steps", "2", "--output", "out", folder=tmp_path)
    assert "\nBefore\n" in printed and "\nAfter\n" in printed and "epoch 0: train loss" in printed
    assert adapter(tmp_path / "out") == ("PREFIX_TUNING", 30 * 8 * 2 * 256)
    assert (tmp_path / "out" / "training_state.safetensors").is_file()


def test_prompt_two_adapters_with_data_of_ones_own(tmp_path):
    own = str(DATA / "prompts" / "test.jsonl")
    printed = run("prompt_two_adapters.py", "--max-steps", "2", "--data", own, "--output", "out")
    assert "After (prompts)" in printed and "After (quotes)" in printed and "answers as before" in printed
    assert adapter(tmp_path / "out" / "prompts") == adapter(tmp_path / "out" / "quotes") == ("PROMPT_TUNING", 4 * 256)


@pytest.mark.parametrize("encoder", ["mlp", pytest.param("lstm", marks=pytest.mark.slow)])
def test_p_tuning_alpaca(tmp_path, encoder):
    printed = run("p_tuning_alpaca.py", "--encoder", encoder, "--max-steps", "2", "--output", "out")
    assert "Before " in printed and "After " in printed and "Reference" in printed
    assert adapter(tmp_path / "out") == ("P_TUNING", 10 * 256)


@pytest.mark.parametrize("flag", [None, pytest.param("--no-quantization", marks=pytest.mark.slow)])
def test_lora_int8_quotes(tmp_path, flag):
    given = ["--max-steps", "2", "--target-modules", "query_key_value", *filter(None, [flag])]
    printed = run("lora_int8_quotes.py", *given, "--output", "out")
    assert f"takes {40.1 if flag else 22.1} MiB" in printed and "After " in printed
    assert "trainable params: 65,536 || all params: 10,578,944" in printed
    assert adapter(tmp_path / "out") == ("LORA", 8 * 8 * (256 + 768))
    assert form(tmp_path / "out") == ("float32" if flag else "int8")


@pytest.mark.parametrize("flag", [None, pytest.param("--no-quantization", marks=pytest.mark.slow)])
def test_qlora_adgen(tmp_path, flag):
    given = ["--batch-size", "4", "--accumulation", "1", "--output", "out", *filter(None, [flag])]
    printed = run("qlora_adgen.py", "--max-steps", "2", *given)
    assert f"takes {40.11 if flag else 19.11} MiB" in printed and "类型#" in printed and "After " in printed
    assert adapter(tmp_path / "out") == adapter(tmp_path / "out" / "checkpoint-2") == ("LORA", 8 * 4 * (256 + 768))
    assert form(tmp_path / "out") == ("float32" if flag else "nf4")
    if flag is None:
        run("qlora_adgen.py", "--max-steps", "3", *given, "--resume", "out/checkpoint-2")
        assert (tmp_path / "out" / "checkpoint-3").is_dir()


def test_qlora_adgen_in_other_dtypes(tmp_path):
    """The document's compute dtype, and what it says on a CPU."""
    given = ["--batch-size", "2", "--accumulation", "1", "--max-steps", "1", "--output", "out"]
    printed = run("qlora_adgen.py", *given, "--compute-dtype", "fp16")
    assert "products in float32 instead of float16" in printed
