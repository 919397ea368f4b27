"""What the tests of LoRA share."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from families import batch
from helpers import still, twenty_steps
from test_parity import theirs

import graftlm

OPTIONS = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": "all-linear"}


def twenty(name: str, make: Any, lr: float = 0.003) -> tuple[list[float], list[float]]:
    """Losses of 20 steps of AdamW, ours and HF PEFT's, from one start."""
    found, start = [], {}
    for lib in (graftlm, peft):
        torch.manual_seed(3)
        model = (theirs if lib is peft else graftlm.get_peft_model)(still(name), make(lib))
        if lib is peft:
            peft.set_peft_model_state_dict(model, start)
        else:
            start = {k: v.detach().clone() for k, v in graftlm.get_peft_model_state_dict(model).items()}
        losses = twenty_steps(model, lambda step: batch(name, seed=step % 4), lr)
        found.append(losses)
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    assert sum(found[0][-4:]) < sum(found[0][:4])
    return found[0], found[1]
