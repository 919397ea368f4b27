"""A tiny base with the bundled tokenizer, and one small comparison that most tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comparison_helpers import BROKEN, DATA, DIVERGING, SETTINGS
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM

from graftlm.bundled import base_path
from graftlm.comparison import ComparisonResult, compare


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    config = BloomConfig(
        vocab_size=16384, hidden_size=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2, pad_token_id=3
    )
    BloomForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_path()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def result(base: str, tmp_path_factory: pytest.TempPathFactory) -> ComparisonResult:
    """Five methods, and two that fail."""
    folder: Path = tmp_path_factory.mktemp("comparison") / "out"
    methods = ["lora:r=2", BROKEN, "prompt-tuning", "p-tuning", DIVERGING, "prefix-tuning", "bottleneck"]
    return compare(
        base=base, data=DATA, methods=methods, output_dir=folder, settings=SETTINGS, quiet=True,
        overrides={"prompt-tuning": {"method_options": {"num_virtual_tokens": 3}}}, command="graftlm compare …",
    )  # fmt: skip
