"""What a trainer asks of its surroundings, and is told by them: stops, passes with other runs, the log of an epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from .. import processes
from ..adapters import AdapterSet
from .surroundings import log


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C, after a checkpoint and the adapter were saved."""


@dataclass
class Request:
    """A training pass that a run waits for.

    Args:
        items: what the sum of its labels' losses is divided by; None: their number.
        parts: by what that is divided, penalty and all.
        given: `num_items_in_batch` as the Trainer has it.
        loss: filled in when the pass is over, its gradients in place; `error` instead where it failed.
    """

    trainer: Any
    model: Any
    inputs: dict[str, Any]
    items: float | None
    parts: int
    given: Any = None
    loss: Tensor | None = None
    error: Exception | None = None

    @property
    def answered(self) -> bool:
        return self.loss is not None or self.error is not None


class RankSchedule(TrainerCallback):
    """For a `transformers.Trainer`: AdaLoRA's ranks after each step (`graftlm.Trainer` has it). An adapter without
    `total_step` takes the Trainer's number of steps.

        Trainer(model, arguments, callbacks=[graftlm.RankSchedule()], …)
    """

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for method, host in self._methods(model):
            method.before_steps(host, state.max_steps)

    def on_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for method, host in self._methods(model):
            method.after_step(host, state.global_step)

    @staticmethod
    def _methods(model: Any) -> list[tuple[Any, Any]]:
        host = extract_model_from_parallel(model)
        return [(host.methods[name], host) for name in host.switch.active] if isinstance(host, AdapterSet) else []


class StopWhenAsked(TrainerCallback):
    """After `ask()`, stops training at the next step's end, with a checkpoint."""

    def __init__(self) -> None:
        self.asked = self.stopped = False

    def ask(self) -> None:
        """The handler of Ctrl-C; a second one interrupts at once."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if processes.is_first():
            log.warning("Stopping after this step; a checkpoint is saved. Ctrl-C again stops at once, without one.")

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:  # all stop after the same step
            asked = torch.tensor(float(self.asked), device=args.device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            self.asked = bool(asked)
        if self.asked:
            self.stopped = control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopped:
            control.should_save = control.should_evaluate = False


class EpochLog(TrainerCallback):
    """Logs each epoch's training loss when the epoch has ended."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if abs((state.epoch or 0) - round(state.epoch or 0)) < 1e-9:  # resumed between an epoch's last step and its end
            self._log(control)

    def on_epoch_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer.stop.stopped:
            self._log(control)

    def _log(self, control: Any) -> None:
        entry = self.trainer._epoch_entry()
        if entry:
            should_log = control.should_log
            self.trainer.log(entry)
            control.should_log = should_log
