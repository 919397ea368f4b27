"""A tiny base with the bundled tokenizer, adapters of it, and a runner of the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM
from typer.testing import CliRunner

import graftlm
from graftlm.bundled import base_path

CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: graftlm.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False),
    "prompt": lambda: graftlm.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "ptuning": lambda: graftlm.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "bottleneck": lambda: graftlm.BottleneckConfig(task_type="CAUSAL_LM"),
}


def tiny_model(hidden: int = 16, seed: int = 0) -> BloomForCausalLM:
    torch.manual_seed(seed)
    config = BloomConfig(
        vocab_size=16384, hidden_size=hidden, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2, pad_token_id=3
    )
    return BloomForCausalLM(config).eval()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_path()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def adapters(base: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Directories by the names of `CONFIGS`."""
    root = tmp_path_factory.mktemp("adapters")
    for name, config in CONFIGS.items():
        torch.manual_seed(1)
        graftlm.get_peft_model(BloomForCausalLM.from_pretrained(base), config()).save_pretrained(root / name)
    return {name: str(root / name) for name in CONFIGS}


@pytest.fixture
def cli() -> Callable[..., Any]:
    """Runs `graftlm` with arguments; the result has exit_code, stdout, stderr."""
    from graftlm.cli import app

    def call(*arguments: str, stdin: str | None = None) -> Any:
        return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)

    return call


def rewrite(folder: Path, **changes: Any) -> None:
    """Change keys of an adapter's configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
