"""HF PEFT is the oracle: its checkpoints read here, ours read there; logits, losses and generated tokens equal."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as t
from families import ALL, CAUSAL, ENCODERS, SEQ2SEQ, VOCAB, batch
from helpers import BIASED, close, config, fresh, randomise

import graftlm

LORA = ("lora", "dora")
LORA_VARIANTS = ("lora_default", "rslora", "patterns", "bias_all", "bias_lora_only", "modules_to_save", "embedding", "gaussian")
SOFT = ("prompt", "p_tuning_mlp", "p_tuning_lstm", "prefix", "prefix_projection")
QUICK = ("bloom", "gpt2", "llama", "t5", "bert")


def run(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        out = model(**inputs)
    return out.logits, out.loss


def theirs(base: Any, settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base, settings)


def from_theirs(base: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base, folder)


def both_ways(base: Any, method: str, name: str, inputs: dict[str, Any], folder: Path) -> None:
    """HF PEFT's directory read by us, and ours read by HF PEFT; outputs equal, and unlike the base's."""
    plain, _ = run(base(), inputs)
    their = randomise(theirs(base(), config(method, name, peft))).eval()
    their.save_pretrained(folder / "theirs")
    wanted = run(their, inputs)
    mine = graftlm.PeftModel.from_pretrained(base(), folder / "theirs")
    got = run(mine, inputs)
    close(got[0], wanted[0])
    close(got[1], wanted[1])
    assert (got[0][:, -plain.shape[1] :] - plain).abs().max() > 1e-3, "the adapter has no effect"

    mine = randomise(graftlm.get_peft_model(base(), config(method, name)), seed=9).eval()
    mine.save_pretrained(folder / "mine")
    wanted = run(mine, inputs)
    got = run(from_theirs(base(), folder / "mine").eval(), inputs)
    close(got[0], wanted[0])
    close(got[1], wanted[1])


def cases(methods: tuple[str, ...], slow_outside: tuple[str, ...] = tuple(ALL)) -> list[Any]:
    return [
        pytest.param(n, m, id=f"{n}-{m}", marks=[] if n in slow_outside else [pytest.mark.slow])
        for n in ALL for m in methods
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "method"), cases(LORA) + cases(LORA_VARIANTS, QUICK) + cases(SOFT))
def test_checkpoints_both_ways(name: str, method: str, tmp_path: Path) -> None:
    both_ways(lambda: fresh(name), method, name, batch(name), tmp_path)
