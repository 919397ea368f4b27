"""A tiny base with the bundled tokenizer, adapters of it, and a runner of the command line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cli_helpers import CONFIGS, tiny_model
from transformers import AutoTokenizer, BloomForCausalLM
from typer.testing import CliRunner

import graftlm
from graftlm.bundled import base_path


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
