"""Configurations of the tests' adapters, the tiny base, and damage to an adapter's configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import BloomConfig, BloomForCausalLM

import graftlm

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


def rewrite(folder: Path, **changes: Any) -> None:
    """Change keys of an adapter's configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
