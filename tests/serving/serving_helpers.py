"""A service over a tiny base with adapters of several kinds, and an app over it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from fastapi.testclient import TestClient
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import graftlm
from graftlm.bundled import base_path
from graftlm.serving.app import create_app
from graftlm.serving.service import Service
from graftlm.serving.settings import Settings
from graftlm.serving.start import service_of

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
KINDS: dict[str, Any] = {
    "style": lambda: graftlm.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "task": lambda: graftlm.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "memory": lambda: graftlm.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "block": lambda: graftlm.BottleneckConfig(reduction_factor=4, task_type="CAUSAL_LM"),
}


def tokenizer() -> Any:
    made = AutoTokenizer.from_pretrained(base_path())
    made.chat_template = TEMPLATE
    return made


def tiny(seed: int = 0) -> Any:
    """A Llama that says different things to different prompts."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def saved(root: Path, names: Any = KINDS, seed: int = 1) -> dict[str, str]:
    """Adapters of the tiny base in folders below `root`, by name."""
    made = {}
    for i, name in enumerate(names):
        model = graftlm.get_peft_model(tiny(), KINDS[name]())
        torch.manual_seed(seed + i)
        with torch.no_grad():
            for _, parameter in model.adapter_parameters("default"):
                parameter.add_(torch.randn(parameter.shape) * 0.3)
        model.save_pretrained(root / name)
        made[name] = str(root / name)
    return made


@contextmanager
def served(
    adapters: dict[str, str], limits: dict[str, Any] | None = None, base: Any = None, **settings: Any
) -> Iterator[tuple[Any, Service]]:
    """A client of a running app, and its service."""
    service = service_of(
        base or tiny(), tokenizer(), Settings(base_name="tiny", adapters=adapters, **settings), **limits or {}
    )
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        yield client, service


def alone(folder: str | None, prompt: str, most: int) -> str:
    """What `generate` gives by itself, greedily."""
    model = tiny()
    if folder is not None:
        model = graftlm.PeftModel.from_pretrained(model, folder).eval()
    given = tokenizer()(prompt, return_tensors="pt")
    out = model.generate(**given, max_new_tokens=most, do_sample=False, pad_token_id=0)
    return tokenizer().decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def process(root: Path, *options: str, port: int | None = None, log: str | None = None) -> Iterator[tuple[str, Any]]:
    """A server in a process of its own, as a user starts it, once it is ready: its address, and the process.

    Args:
        root: where the tiny base is, or is put, and the log.
        log: a file for its messages.
    """
    if not (root / "tiny").exists():
        tiny().save_pretrained(root / "tiny")
        tokenizer().save_pretrained(root / "tiny")
    port = port or free_port()
    command = [sys.executable, "-m", "graftlm", "serve", "--base", str(root / "tiny"), f"--port={port}", *options]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with open(log or root / "log", "wb") as messages:
        running = subprocess.Popen(command, stderr=messages, env=paths)
    try:
        until = time.monotonic() + 300
        while True:
            assert running.poll() is None and time.monotonic() < until, log or (root / "log").read_text()
            try:
                if httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", running
    finally:
        running.kill()
        running.wait()
