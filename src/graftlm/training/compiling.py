"""`torch.compile` for a base's layers, kept only where it pays.

Before training, a run's first rows go through the model with its layers as they are and with compiled ones. Losses and
gradients must agree (dropout off), and the compiled passes must be clearly faster; otherwise nothing is compiled.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from ..joint import dropout_off
from ..kernels.timing import time_ratio
from .meters import reset_peak_memory

log = logging.getLogger(__name__)

GAIN = 0.95  # a compiled pass must take less than this share of a plain one


@dataclass(frozen=True)
class Trial:
    """What a trial gave.

    Args:
        kept: whether the layers stay compiled.
        ratio: a compiled pass's time over a plain one's; None where it did not come to that.
        reason: why they are not kept; empty where they are.
    """

    kept: bool
    ratio: float | None = None
    reason: str = ""


class CompiledLayers(TrainerCallback):
    """Compiles the layers of a Trainer's model when training begins, if a trial says that it pays; plain again at its end.

    Args:
        trainer: any `transformers.Trainer`; add the callback to it.
        times: timed passes each way; the shortest are compared.
    """

    def __init__(self, trainer: Any, times: int = 5) -> None:
        self.trainer, self.times = trainer, times
        self.trial: Trial | None = None
        self.calls: dict[nn.Module, Any] = {}  # the compiled call of each layer
        self.limits: dict[str, int] = {}  # of the compiler, as they were

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trial = self.tried()
        reset_peak_memory()
        if self.trial.kept:
            log.info("torch.compile: a pass takes %.2f of its time", self.trial.ratio)
        else:
            log.warning("torch.compile is left out: %s", self.trial.reason)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.switch(False)
        for name, limit in self.limits.items():
            setattr(torch._dynamo.config, name, limit)

    def layers(self) -> list[nn.Module]:
        """The layers of transformers' models, by the class that they share."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]

    def switch(self, on: bool) -> None:
        """Let the layers run compiled (for inputs of any length), or as they are."""
        for layer in self.layers():
            if on and layer not in self.calls:
                layer.compile(dynamic=True)
                self.calls[layer] = layer._compiled_call_impl
            layer._compiled_call_impl = self.calls[layer] if on else None

    def tried(self) -> Trial:
        """Compile, compare and time; the layers stay so if it pays. Random numbers and gradients stay as they were."""
        model, count = self.trainer.accelerator.unwrap_model(self.trainer.model), len(self.layers())
        if not count:
            return Trial(False, reason=f"{type(model).__name__} has no layers of transformers' usual kind")
        if any(layer._compiled_call_impl is not None and layer not in self.calls for layer in self.layers()):
            return Trial(False, reason="layers of this model are compiled already")
        config = torch._dynamo.config
        self.limits = {name: getattr(config, name) for name in ("recompile_limit", "accumulated_recompile_limit")}
        for name, limit in self.limits.items():  # a layer's number is part of what is compiled
            setattr(config, name, limit * count)
        states, kept = (random.getstate(), np.random.get_state()), False
        try:
            with torch.random.fork_rng():
                trial = self._compare(model)
            kept = trial.kept
        finally:
            self.switch(kept)
            random.setstate(states[0])
            np.random.set_state(states[1])
        return trial

    def _compare(self, model: Any) -> Trial:
        try:
            for mode in (False, True):  # evaluations go through the layers too
                model.train(mode)
                with dropout_off([model]):
                    self.switch(False)
                    wanted = self.one_pass(model)
                    self.switch(True)
                    error = difference(self.one_pass(model), wanted)
                if not error <= tolerance(self.trainer, model):
                    return Trial(False, reason=f"compiled layers change loss or gradients by {error:.1e} of their size")
            self.one_pass(model)  # with dropout it is compiled anew
            ratio = self.ratio(model)
        except Exception as error:  # whatever the compiler cannot do
            lines = str(error).strip().splitlines() or ["no message"]
            return Trial(False, reason=f"it failed ({type(error).__name__}: {lines[0]})")
        if ratio > GAIN:
            return Trial(False, ratio, f"a compiled pass takes {ratio:.2f} of a plain one's time")
        return Trial(True, ratio)

    def one_pass(self, model: nn.Module) -> list[Tensor]:
        """Loss of the first rows, and in training mode its gradients."""
        trainer = self.trainer
        count = min(len(trainer.train_dataset), trainer.args.train_batch_size)
        collate = trainer._get_collator_with_removed_columns(trainer.data_collator)
        inputs = trainer._prepare_inputs(collate([trainer.train_dataset[i] for i in range(count)]))
        trained = [p for p in model.parameters() if p.requires_grad]
        with trainer.compute_loss_context_manager(), torch.set_grad_enabled(model.training):
            loss = trainer.compute_loss(model, inputs)
        if not model.training:
            return [loss]
        return [loss.detach(), *torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)]

    def ratio(self, model: nn.Module) -> float:
        """A compiled pass's time over a plain one's, alternating."""

        def timed(on: bool) -> None:
            self.switch(on)
            self.one_pass(model)

        return time_ratio(partial(timed, True), partial(timed, False), next(model.parameters()), self.times)


def difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The larger of the relative differences of losses and of all gradients together."""
    loss = float((found[0] - wanted[0]).abs() / wanted[0].abs())
    square = sum(float((a - b).float().square().sum()) for a, b in zip(found[1:], wanted[1:], strict=True))
    size = sum(float(b.float().square().sum()) for b in wanted[1:])
    return float(torch.tensor([loss, (square / size) ** 0.5 if size else square]).max())  # NaN where either is


def tolerance(trainer: Any, model: Any) -> float:
    """The largest difference by rounding that is taken for none."""
    full = all(p.dtype is torch.float32 for p in model.parameters() if p.is_floating_point())
    return 1e-3 if full and trainer.accelerator.mixed_precision == "no" else 5e-2
