"""Twenty steps of every shared method follow HF PEFT's losses: same initial adapter, same batches, fp32, AdamW."""

from __future__ import annotations

import peft
import pytest
import torch
from training_helpers import examples, wrapped

STEPS = 20


def curve(model: torch.nn.Module, family: str) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    rows, found = examples(12, family), []
    model.eval()  # no dropout: T5's and the base's would draw differently
    for step in range(STEPS):
        chosen = [rows[(3 * step + i) % len(rows)] for i in range(3)]
        loss = model(**{k: torch.stack([r[k] for r in chosen]) for k in chosen[0]}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("family", ["bloom", "llama", "t5"])
@pytest.mark.parametrize("method", ["lora", "prompt", "p_tuning_mlp", "p_tuning_lstm", "prefix", "prefix_projection"])
def test_losses_follow_peft(family: str, method: str) -> None:
    rival, ours = wrapped(method, family, peft), wrapped(method, family)
    start = {k: p for k, p in rival.named_parameters() if p.requires_grad}
    own = {k: p for k, p in ours.named_parameters() if p.requires_grad}
    assert start.keys() == own.keys()
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(start[key])
    wanted, got = curve(rival, family), curve(ours, family)
    assert len(set(wanted)) == STEPS
    assert max(abs(a - b) for a, b in zip(wanted, got, strict=True)) < 1e-4
