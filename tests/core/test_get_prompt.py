"""`get_prompt`: what stands in front of rows, as HF PEFT gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import close, fresh, randomise

import graftlm
from graftlm.errors import AdapterError

CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}
SOFT = {
    "prompt": graftlm.PromptTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "p_tuning": graftlm.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **CAUSAL),
    "prefix": graftlm.PrefixTuningConfig(num_virtual_tokens=4, **CAUSAL),
}


@pytest.mark.parametrize("name", SOFT)
def test_it_is_hf_pefts(name: str, tmp_path: Path) -> None:
    model = randomise(graftlm.get_peft_model(fresh("gpt2"), SOFT[name])).eval()
    model.save_pretrained(tmp_path)
    other = peft.PeftModel.from_pretrained(fresh("gpt2"), tmp_path).eval()
    with torch.no_grad():
        got, wanted = model.get_prompt(2), other.get_prompt(2)
    if name != "prefix":
        assert got.shape == (2, 3, model.config.hidden_size)
        close(got, wanted)
        return
    pairs = zip(got.layers, getattr(wanted, "self_attention_cache", wanted).layers, strict=True)
    for own, layer in pairs:
        close(own.keys, layer.keys)
        close(own.values, layer.values)


def test_nothing_to_give() -> None:
    model = graftlm.get_peft_model(fresh("gpt2"), graftlm.LoraConfig(**CAUSAL))
    with pytest.raises(AdapterError, match="neither virtual tokens nor a prefix"):
        model.get_prompt(2)
    model.add_adapter("prompt", SOFT["prompt"])
    model.add_adapter("prefix", SOFT["prefix"])
    model.set_adapter(["prompt", "prefix"])
    with pytest.raises(AdapterError, match="both virtual tokens and a prefix"):
        model.get_prompt(2)


def test_each_row_has_its_task() -> None:
    config = graftlm.MultitaskPromptTuningConfig(num_virtual_tokens=2, num_tasks=2, **CAUSAL)
    model = randomise(graftlm.get_peft_model(fresh("gpt2"), config)).eval()
    rows = model.get_prompt(2, torch.tensor([0, 1]))
    assert not torch.equal(rows[0], rows[1])
    close(rows[1:], model.get_prompt(1, torch.tensor([1])))
