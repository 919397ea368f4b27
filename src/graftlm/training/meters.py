"""What the trainer measures: losses over labelled tokens, real tokens per second, peak memory."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

IGNORE_INDEX = -100
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def perplexity(loss: float) -> float:
    """``exp(loss)``, loss in nats a token; infinity where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def real_tokens(inputs: Mapping[str, Any]) -> int:
    """Tokens of a batch that are not padding: the mask's ones, or all input ids where there is no mask."""
    for name in ("attention_mask", "input_ids", "inputs_embeds"):
        value = inputs.get(name)
        if isinstance(value, Tensor):
            return int(value.sum()) if name == "attention_mask" else value.shape[0] * value.shape[1]
    return 0


def labelled_tokens(inputs: Mapping[str, Any], shifted: bool) -> int:
    """Labels that enter the loss: those that are not -100, without each row's first where the loss shifts them."""
    labels = inputs.get("shift_labels")
    if labels is None:
        labels = inputs.get("labels")
        if not isinstance(labels, Tensor):
            return 0
        labels = labels[..., 1:] if shifted and labels.dim() > 1 else labels
    return int(labels.ne(IGNORE_INDEX).sum())


def reset_peak_memory() -> None:
    """Start the peak anew, where the system allows it (Linux; CUDA)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return  # the peak then counts from the start of the process


def peak_memory() -> int:
    """Peak memory in bytes: allocated on the GPU where training runs there, else the process's resident set."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text(encoding="ascii"))
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_now() -> int:
    """Memory in use, in bytes, counted as `peak_memory` counts; 0 where the system does not say."""
    if torch.cuda.is_available():
        return int(torch.cuda.memory_allocated())
    try:
        found = re.search(r"VmRSS:\s+(\d+) kB", STATUS.read_text(encoding="ascii"))
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else 0


class TokenLoss:
    """A sum of losses and the number of labelled tokens behind it."""

    def __init__(self) -> None:
        self.total = 0.0
        self.tokens = 0

    def add(self, mean: float, tokens: int) -> None:
        """Take in a mean over `tokens` tokens."""
        if tokens:
            self.add_sum(mean * tokens, tokens)

    def add_sum(self, total: float, tokens: int) -> None:
        """Take in a sum over `tokens` tokens; NaN and infinities are left out, as the Trainer does in its own log."""
        if math.isfinite(total):
            self.total += total
            self.tokens += tokens

    @property
    def mean(self) -> float | None:
        """Nats a token; None before any token."""
        return self.total / self.tokens if self.tokens else None


class EpochMeter(TrainerCallback, ExportableState):
    """Adds up losses and tokens during an epoch, and time spent in training steps.

    Its sums travel in `trainer_state.json`, so that an epoch that was cut by a kill reports its whole mean after resuming.
    Seconds exclude evaluation and saving.
    """

    def __init__(self) -> None:
        self.loss = TokenLoss()
        self.tokens = 0
        self.seconds = 0.0
        self._started: float | None = None

    def state(self) -> dict[str, Any]:
        sums = {"total": self.loss.total, "labelled": self.loss.tokens}
        return {"args": {}, "attributes": {"sums": sums}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.loss, self.tokens, self.seconds = TokenLoss(), 0, 0.0
        stored = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        stored = stored[-1] if isinstance(stored, list) else stored
        sums = stored.get("attributes", {}).get("sums", {})
        if args.process_index == 0:  # they are of all processes
            self.loss.total, self.loss.tokens = sums.get("total", 0.0), sums.get("labelled", 0)
        reset_peak_memory()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._started is not None:
            self.seconds += time.perf_counter() - self._started
            self._started = None

    @property
    def tokens_per_second(self) -> float:
        """Real (not padding) tokens trained on in a second since `train` was called."""
        return self.tokens / self.seconds if self.seconds else 0.0
