"""What the tests in a browser share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from graftlm.studio import records

LONG = 600_000  # ms in which what needs the libraries must be there, on a machine that does other things too
TINY = "base: bases/tiny\ndata: {source: tweets, max_eval_examples: 2}\n"  # the beginning of a recipe


def tiny_base(folder: Path, tokenizer_of: str = "graftlm-base") -> None:
    """A Llama of two narrow layers with a bundled base's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from graftlm.bundled import resolve

    tokenizer = AutoTokenizer.from_pretrained(resolve(tokenizer_of))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def home(page: Any) -> str:
    """The studio's address."""
    return re.match(r"http://[^/]+", page.url)[0]  # type: ignore[index]


def ready(page: Any) -> None:
    """Wait until the form is there."""
    page.locator("#f-method").wait_for(timeout=LONG)


def state(page: Any, *wanted: str) -> None:
    """Wait until a run's page shows one of these states."""
    page.locator(", ".join(f"#state .badge.{w}" for w in wanted)).wait_for(timeout=LONG)


def begin(page: Any, text: str, *more: str) -> str:
    """Start a run of a recipe from the Train page, and others together with it; its name."""
    page.goto(home(page) + "/train")
    ready(page)
    for count, other in enumerate(more, 1):
        page.fill("#yaml", other)
        page.click("#put-beside")
        page.locator("#together li").nth(count - 1).wait_for(timeout=LONG)
    page.fill("#yaml", text)
    page.click("#start")
    page.wait_for_url("**/runs/*")
    return page.url.rpartition("/")[2]


def trained(page: Any, root: Path) -> str:
    """The name of a run that has an adapter over the tiny base; one is trained where there is none."""
    for measures in sorted((root / "runs").glob("*/metrics.json")):
        if records.read(measures.with_name("adapter_config.json")).get("base_model_name_or_path") == "bases/tiny":
            return measures.parent.name
    name = begin(page, TINY + "training: {max_steps: 4, eval_strategy: 'no', save_strategy: 'no'}\n")
    state(page, "done")
    return name
