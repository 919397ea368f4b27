"""`transformers.Trainer` with what adapter training wants to show and keep. It adds; it replaces nothing but the bar.

Added to `log_history` (losses in nats a labelled token, exact over unequal batches):

| entry            | keys                                                                                   |
|------------------|----------------------------------------------------------------------------------------|
| after each epoch | `epoch_train_loss`, `epoch_train_perplexity`, `tokens_per_second`, `peak_memory_bytes` |
| each evaluation  | `eval_loss`, `eval_perplexity`                                                         |
| at the end       | `train_tokens_per_second`, `peak_memory_bytes`                                         |

With label smoothing the training loss is the smoothed one and has no perplexity; the evaluation loss is the plain one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from ..errors import CheckpointError
from ..model import PeftModel
from .across import AcrossProcesses
from .arguments import check_precision
from .callbacks import EpochLog, RankSchedule, Request, StopWhenAsked, TrainingInterrupted
from .curve import save_curve
from .joining import Joiner
from .meters import EpochMeter, TokenLoss, labelled_tokens, peak_memory, perplexity, real_tokens
from .progress import RichProgress
from .resume import checkpoints, last_complete_checkpoint
from .sharing import LABELS, cut, has_classes, own_rows, weighed, without_fillers
from .surroundings import interrupts_go_to, log


class Trainer(AcrossProcesses):
    """A `transformers.Trainer` for adapters; every argument and method of it stays as it is.

    * `train(resume_from_checkpoint=True)` takes the last *complete* checkpoint and says which ones it passed over;
    * Ctrl-C or SIGTERM ends the running step, saves a checkpoint and the adapter, and raises `TrainingInterrupted`;
    * `save_model()` puts `loss.png` beside the adapter and the measures into its model card;
    * a rich progress bar takes the place of tqdm's (plain lines outside a terminal or with `disable_tqdm=True`).

    Raises:
        ConfigError: fp16 on a CPU.
        CheckpointError: `resume_from_checkpoint=True` without a complete checkpoint.
    """

    label_smoother: Any
    _loss_shifts_labels: bool

    def __init__(self, model: Any = None, args: TrainingArguments | None = None, *rest: Any, **kwargs: Any) -> None:
        check_precision(args)
        super().__init__(model, args, *rest, **kwargs)
        self.meter = EpochMeter()
        self.stop = StopWhenAsked()
        self.progress = RichProgress(bar=False if self.args.disable_tqdm else None)
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        # the meter first: it starts clocks and sums; the stop last: it overrules what others decide
        for callback in (self.meter, EpochLog(self), self.progress, self.stop):
            self.add_callback(callback)
        if not any(isinstance(own, RankSchedule) for own in self.callback_handler.callbacks):
            self.add_callback(RankSchedule())
        self._pending: list[Tensor] = []
        self.joiner = Joiner()
        self._evaluated = TokenLoss()
        self._measuring = False
        self._labels = 0  # of a batch, over all processes
        inner = self.accelerator.unwrap_model(self.model)
        if has_virtual_tokens(inner) and (self.label_smoother is None or self._smooths_inside(inner)):
            self._loss_shifts_labels = False  # the last virtual token predicts the first real one: every label counts

    # -- running -----------------------------------------------------------------------------------------------------
    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer.train`; see the class for what differs."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_complete_checkpoint()
        self.stop.asked = self.stop.stopped = False
        self.joiner.take()  # what an interrupted update left
        self._share_out()
        try:
            with interrupts_go_to(self.stop.ask) if self.member is None else nullcontext():
                output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.progress.close()
            self._let_go()
        if self.stop.stopped:
            self.save_adapter()
            raise TrainingInterrupted(
                f"Training was stopped at step {self.state.global_step} of {self.state.max_steps}. The adapter and a "
                f"checkpoint are in {self.args.output_dir}; train(resume_from_checkpoint=True) goes on from there."
            )
        return output

    def _last_complete_checkpoint(self) -> str:
        notes: list[str] = []
        found = last_complete_checkpoint(self.args.output_dir, notes)  # type: ignore[arg-type]
        for note in notes:
            log.warning(note)
        if found is None:
            have = ", ".join(p.name for p in checkpoints(self.args.output_dir)) or "none"  # type: ignore[arg-type]
            raise CheckpointError(
                f"There is no complete checkpoint in {self.args.output_dir} to resume from (found: {have}). "
                "Train from the start with resume_from_checkpoint=None."
            )
        return str(found)

    def get_batch_samples(self, epoch_iterator: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers', without labels on rows that fill up the last batch among several processes."""
        own = map(partial(without_fillers, self.accelerator), epoch_iterator) if self._plain_loss else epoch_iterator
        return super().get_batch_samples(own, *args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Short batches that make up one update are trained as one packed batch: the same gradient in fewer passes."""
        if self._may_join(num_items_in_batch):
            batches = self.joiner.add(inputs, self.accelerator.sync_gradients)
        else:
            batches = [inputs]
        loss = torch.zeros((), device=self.args.device)
        for i, batch in enumerate(batches, 1):  # processes may have different numbers of them: the last one alone is shared
            with self.accelerator.no_sync(model) if i < len(batches) else nullcontext():
                loss = loss + self._training_step(model, batch, num_items_in_batch)
        if self.exchange is not None and self.accelerator.sync_gradients:
            self.exchange()
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer.compute_loss`; a smoothed loss is left to models that need no logits for it."""
        smoother, labels = self.label_smoother, {k: inputs[k] for k in LABELS if k in inputs}
        if smoother is None or not self._smooths_inside(self.accelerator.unwrap_model(model), inputs):
            found = super().compute_loss(model, inputs, *args, **kwargs)
        else:
            with self._unsmoothed():
                found = super().compute_loss(model, {**inputs, "label_smoothing": smoother.epsilon}, *args, **kwargs)
        if self.accelerator.num_processes == 1 or not model.training:
            return found
        return self._shared_loss(model, inputs | labels, found, kwargs.get("num_items_in_batch"))

    def _shared_loss(self, model: nn.Module, inputs: dict[str, Any], loss: Tensor, items: Any) -> Tensor:
        """The loss of one process's rows as its part of the loss over all processes' rows (see `sharing`)."""
        inner, count = self.accelerator.unwrap_model(model), self.accelerator.num_processes
        if not (isinstance(inner, PeftModel) and self._plain_loss and has_classes(inputs)):
            return loss
        scaled = self.args.average_tokens_across_devices and self.model_accepts_loss_kwargs and items is not None
        penalty: Any = inner.penalty(inner.switch.active) if inner.penalised else 0.0
        if self._heeded(model, items):
            return loss - (count - 1) * penalty if scaled else loss
        mean = (loss / count if scaled else loss) - penalty
        return weighed(mean, self._weight(inputs), self._labels, count) + penalty

    def _smooths_inside(self, model: Any, inputs: dict[str, Any] | None = None) -> bool:
        """Whether transformers' smoothed loss (not someone's own) can be left to the model."""
        usual = type(self.label_smoother) is LabelSmoother and self.label_smoother.ignore_index == -100
        if not usual or self.compute_loss_func is not None or not isinstance(model, PeftModel):
            return False
        with self.accelerator.autocast():
            return (inputs is None or "labels" in inputs) and model.makes_loss(inputs)

    @contextmanager
    def _unsmoothed(self) -> Iterator[None]:
        """Within the block transformers takes the model's loss as it is."""
        smoother, self.label_smoother = self.label_smoother, None
        try:
            yield
        finally:
            self.label_smoother = smoother

    def _may_join(self, num_items_in_batch: Any) -> bool:
        model = self.accelerator.unwrap_model(self.model)
        several = self.args.gradient_accumulation_steps > 1 and num_items_in_batch is not None and self.args.n_gpu <= 1
        if not (several and self._plain_loss and self.model_accepts_loss_kwargs and isinstance(model, PeftModel)):
            return False
        if self.accelerator.num_processes > 1 and not self._heeded(model, num_items_in_batch):
            return False
        shared_out = self.exchange is not None or self.zero is not None
        if model.penalised or shared_out:  # added to the loss of each batch; passes that all make alike
            return False
        with self.accelerator.autocast():  # as in the passes
            return model.can_pack()

    @property
    def _plain_loss(self) -> bool:
        """Whether the loss is the model's (perhaps smoothed), not someone's own."""
        return type(self).compute_loss is Trainer.compute_loss and self.compute_loss_func is None

    def _training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        counts = self._weight(inputs), real_tokens(inputs)
        if self.accelerator.num_processes > 1 and not self._heeded(model, num_items_in_batch):
            self._labels = int(self.accelerator.reduce(torch.tensor(counts[0], device=self.args.device), "sum"))
        loss = self._pass(model, inputs, num_items_in_batch)
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:  # the sum over all tokens of the step
            total = loss * num_items_in_batch / self.accelerator.num_processes  # a share of a penalty without labels, too
        else:
            total = loss * self.current_gradient_accumulation_steps * counts[0]
        self._pending.append(torch.stack([total.detach().float().mean(), *(total.new_tensor(c).float() for c in counts)]))
        if len(self._pending) >= 64 or self.accelerator.device.type == "cpu":
            self._drain()
        return loss

    def _pass(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        """Forward and backward of one batch: alone, or as a member of several runs in a pass with theirs."""
        if self.member is None or not self._may_share():
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        inputs = self._prepare_inputs(inputs)
        heeded = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        items = float(num_items_in_batch) if heeded and self._heeds_items(model) else None
        if (n := self.accelerator.num_processes) > 1:  # the mean over processes is taken later
            items = (self._labels if items is None else items) / n
        parts = 1 if heeded else self.current_gradient_accumulation_steps
        request = Request(self, self.accelerator.unwrap_model(self.model), inputs, items, parts, num_items_in_batch)
        return self.member.step(request)

    def _may_share(self) -> bool:
        full = not (self.args.fp16 or self.args.bf16)  # no autocast, no gradient scaling
        return full and self._plain_loss and self.label_smoother is None and self.args.n_gpu <= 1

    def _heeded(self, model: Any, items: Any) -> bool:
        """Whether the loss divides by the number of labels of the whole update."""
        return items is not None and (self.label_smoother is not None or self._heeds_items(model))

    def _heeds_items(self, model: Any) -> bool:
        """Whether the base's loss does, when it is told."""
        inner = self.accelerator.unwrap_model(model)
        return isinstance(inner, PeftModel) and inner.heeds_items()

    def own_step(self, request: Request) -> Tensor:
        """The pass of a request without other runs."""
        return super().training_step(self.model_wrapped, request.inputs, request.given)

    def _weight(self, inputs: dict[str, Any]) -> int:
        """Labelled tokens of a batch; its rows where it has no `labels`."""
        rows = next((v.shape[0] for v in inputs.values() if isinstance(v, Tensor) and v.dim()), 0)
        return labelled_tokens(inputs, self._loss_shifts_labels) if "labels" in inputs else rows

    def _drain(self) -> None:
        """Bring the steps' measures from the device into the meter."""
        pending, self._pending = self._pending, []
        for total, labelled, real in torch.stack(pending).tolist() if pending else ():
            self.meter.loss.add_sum(total, int(labelled))
            self.meter.tokens += int(real)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._drain()
        whole = self._over_processes(self.meter.loss)  # the first process saves its sums, and goes on with them
        self.meter.loss = whole if self.args.process_index == 0 else TokenLoss()
        super()._save_checkpoint(*args, **kwargs)

    # -- measures ----------------------------------------------------------------------------------------------------
    @property
    def _has_perplexity(self) -> bool:
        model = self.accelerator.unwrap_model(self.model)
        return bool(getattr(model, "can_generate", lambda: False)())

    def _epoch_entry(self) -> dict[str, float]:
        """The log entry of the epoch that has just ended; empty where nothing was trained. The sums start anew."""
        self._drain()
        sums = self._over_processes(self.meter.loss)
        self.meter.loss = TokenLoss()
        if sums.mean is None:
            return {}
        entry = {"epoch_train_loss": sums.mean}
        if self._has_perplexity and self.label_smoother is None:
            entry["epoch_train_perplexity"] = perplexity(sums.mean)
        return entry | {"tokens_per_second": self._tokens_per_second(), "peak_memory_bytes": peak_memory()}

    def _tokens_per_second(self) -> float:
        """Of all processes, by the clock of this one."""
        if self.accelerator.num_processes == 1 or not self.meter.seconds:
            return self.meter.tokens_per_second
        return float(self._summed(self.meter.tokens)[0]) / self.meter.seconds

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        inputs = without_fillers(self.accelerator, inputs)
        weight = self._weight(inputs)
        with self._unsmoothed(), self._measured_alone():
            found = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            loss, kept = found[0], None if has_classes(inputs) else own_rows(self.accelerator, inputs)
            if kept is not None:  # a pass that the other processes do not make
                own = cut(inputs, kept)
                weight = self._weight(own) if own else 0
                loss = super().prediction_step(model, own, True, ignore_keys)[0] if own else None
        if loss is not None:
            self._evaluated.add(float(loss), weight)
        return found

    @contextmanager
    def _measured_alone(self) -> Iterator[None]:
        """Within the block the loss of each of several processes is the mean over its own rows."""
        self._measuring = True
        try:
            yield
        finally:
            self._measuring = False

    def _get_num_items_in_batch(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', which counts over all processes."""
        alone = self._measuring and self.accelerator.num_processes > 1
        return None if alone else super()._get_num_items_in_batch(*args, **kwargs)

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        self._evaluated = TokenLoss()
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[2] if len(args) > 2 else "eval")
        loss = self._over_processes(self._evaluated).mean
        if loss is not None and output.metrics is not None:
            output.metrics[f"{prefix}_loss"] = loss
            if self._has_perplexity:
                output.metrics[f"{prefix}_perplexity"] = perplexity(loss)
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "train_runtime" in logs:
            self._drain()
            logs["train_tokens_per_second"] = self._tokens_per_second()
            logs["peak_memory_bytes"] = peak_memory()
        super().log(logs, *args, **kwargs)

    # -- files -------------------------------------------------------------------------------------------------------
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `transformers.Trainer.save_model`, with `loss.png` and the measures in the model card."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if isinstance(model, PeftModel):
            model.card_metrics.update(self.card_metrics())
        with self._whole:
            super().save_model(output_dir, _internal_call)
        if self.args.should_save and not _internal_call:
            save_curve(self.state.log_history, output_dir or self.args.output_dir)  # type: ignore[arg-type]

    def save_adapter(self, output_dir: str | os.PathLike | None = None) -> None:
        """Like `save_model`, without the files that only a resuming Trainer reads."""
        folder: Any = output_dir or self.args.output_dir
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if isinstance(model, PeftModel):
            model.card_metrics.update(self.card_metrics())
        with self._whole:
            if self.args.should_save:
                model.save_pretrained(folder)
                save_curve(self.state.log_history, folder)

    def card_metrics(self) -> dict[str, Any]:
        """The measures of this run for the model card: those of the best checkpoint where it was loaded, else the last."""
        history = self.state.log_history
        last: dict[str, Any] = {}
        for entry in history:
            last.update(entry)
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        for entry in history:
            if best and entry.get("step") == best:
                last.update({k: v for k, v in entry.items() if k.startswith("eval_")})
        shown = {name: last[key] for key, name in CARD.items() if key in last}
        arguments = {"learning rate": self.args.learning_rate, "seed": self.args.seed, "steps": self.state.global_step}
        return shown | arguments


def has_virtual_tokens(model: Any) -> bool:
    """Whether virtual tokens stand in front of a model's input embeddings."""
    if not isinstance(model, PeftModel):
        return False
    with torch.no_grad():
        return any(model.methods[name].virtual_tokens(model) is not None for name in model.active_adapters)


CARD = {
    "epoch_train_loss": "training loss (last epoch)", "epoch_train_perplexity": "training perplexity (last epoch)",
    "eval_loss": "held-out loss", "eval_perplexity": "held-out perplexity", "eval_accuracy": "held-out accuracy",
    "train_tokens_per_second": "tokens a second", "peak_memory_bytes": "peak memory in bytes",
    "train_runtime": "seconds",
}  # fmt: skip
