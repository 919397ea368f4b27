"""A joint training pass: batches of several wrappers over one base, each with its own adapters, as one batch.

Every wrapper's adapters, data and random numbers stay its own; the base runs once over all rows. The loss of each batch
comes back as a sum over its labelled tokens, so that whoever trains it divides as if it had been alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapters import AdapterSet
from .architectures import base_modules, is_encoder_decoder
from .architectures.fast import drops
from .passes.row import IGNORED
from .passes.run import run
from .passes.seq2seq import decoder_inputs
from .passes.state import Packed
from .routing import Draws, Plan, Routes

FILLERS = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}


@dataclass(frozen=True)
class Share:
    """What one wrapper brings.

    Args:
        model: in training mode.
        inputs: `input_ids`, `labels`, and perhaps `attention_mask`, [B, T] (an encoder-decoder's labels [B, L]).
        draws: its random numbers; None for torch's generator.
        drops: whether its adapters draw dropout, which is as alone in packed passes only.
    """

    model: AdapterSet
    inputs: dict[str, Tensor]
    draws: Draws | None = None
    drops: bool = False


def joinable(model: Any, inputs: dict[str, Any]) -> bool:
    """Whether a batch can be part of a joint pass."""
    names = {k for k, v in inputs.items() if v is not None}
    if not isinstance(model, AdapterSet) or not model.lean or not {"input_ids", "labels"} <= names <= FILLERS.keys():
        return False
    if any(model.methods[n].tasks > 1 for n in model.switch.active):  # rows need task_ids
        return False
    return all(inputs[k].dim() == 2 for k in names)


def joint_losses(shares: list[Share]) -> list[tuple[Tensor, int]] | None:
    """Each share's loss, summed over its labelled tokens (with a gradient), and their number.

    None where the model allows no short cut (see `passes.shortcuts`), or where dropout would not be drawn as alone: then
    everyone has to run alone.
    """
    lead = shares[0].model
    switches = [share.model.switch for share in shares]
    groups = [switch.active if switch.enabled else () for switch in switches]
    sizes = [len(share.inputs["input_ids"]) for share in shares]
    of = torch.arange(len(shares)).repeat_interleave(torch.tensor(sizes))
    draws = None if shares[0].draws is None else [share.draws for share in shares]
    plan = Plan(lead.switch, groups[0], routes=Routes(groups, of, switches=switches, draws=draws))  # type: ignore[arg-type]
    inputs = stacked([share.inputs for share in shares])
    if is_encoder_decoder(lead.base):
        decoder_inputs(lead.base, inputs)
    done, _ = run(lead, plan, inputs)
    if done.losses is None or (not isinstance(done.layout, Packed) and any(s.drops for s in shares)):
        return None
    found = []
    for i in range(len(shares)):
        own = done.losses[done.targets.owners == i]  # type: ignore[union-attr]
        found.append((own.sum(), len(own)))
    return found


def stacked(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Batches [B_i, T_i] as one [sum of B_i, longest], padded on the right."""
    full = [{"attention_mask": torch.ones_like(b["input_ids"])} | b for b in batches]
    widths = {key: max(b[key].shape[1] for b in full) for key in FILLERS}
    return {
        key: torch.cat([F.pad(b[key], (0, widths[key] - b[key].shape[1]), value=filler) for b in full])
        for key, filler in FILLERS.items()
    }


def adapters_drop(model: AdapterSet) -> bool:
    """Whether a model's own adapters drop anything in training."""
    own = {module for _, module in base_modules(model.base)}
    return any(drops(m) and m.training for m in model.modules() if m not in own)


@contextmanager
def dropout_off(models: Sequence[Any]) -> Iterator[None]:
    """Within the block these models, in training mode, drop nothing."""
    tops = {id(m) for model in models for m in (model, getattr(model, "base", None))}
    every = [m for model in models for m in model.modules() if m.training and id(m) not in tops]
    # an attention may hand its dropout layer's rate to a kernel, by its own mode
    modules = {id(m): m for m in every if any(drops(part) for part in (m, *m.children()))}
    for module in modules.values():
        module.training = False
    try:
        yield
    finally:
        for module in modules.values():
            module.training = True
