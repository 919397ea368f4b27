"""The training loop: Muon for the matrices, AdamW for the rest, a schedule tied to the budget, resumable.

The budget is wall-clock minutes or tokens, whichever is spent first; the learning rate warms up, holds, and decays
linearly to zero at the budget's end. A checkpoint holds masters, optimiser state, position and time spent.
"""

from __future__ import annotations

import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .network import LeanBloom, config

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Defaults are those of the shipped model."""

    minutes: float = 160.0
    tokens: float = 19.2e6
    length: int = 256
    batch: int = 32
    micro: int = 4
    muon_lr: float = 0.01
    adam_lr: float = 0.002
    warmup: float = 0.02
    decay: float = 0.7
    weight_decay: float = 0.02
    save_every: float = 180.0
    threads: int = 0
    max_steps: int = 0


def schedule(spent: float, cfg: TrainConfig) -> float:
    """Learning-rate factor at `spent` (0..1) of the budget."""
    if spent < cfg.warmup:
        return max(spent / cfg.warmup, 0.02)
    return min(1.0, max(0.0, (1.0 - spent) / cfg.decay))


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration of Muon (Jordan et al. 2024) on a stack `[N, rows <= columns, columns]`, in bf16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.float()


class Optimiser:
    """fp32 masters of a bf16 model: Muon on the blocks' matrices, AdamW on embeddings, norms and biases."""

    def __init__(self, model: LeanBloom, cfg: TrainConfig) -> None:
        self.cfg, self.heads = cfg, model.heads
        self.parameters = dict(model.named_parameters())
        self.masters = {name: p.detach().float().clone() for name, p in self.parameters.items()}
        self.first = {name: torch.zeros_like(p) for name, p in self.masters.items()}
        self.muon = [name for name, p in self.masters.items() if p.dim() == 2 and not name.startswith("word")]
        self.adam = [name for name in self.masters if name not in set(self.muon)]
        self.second = {name: torch.zeros_like(self.masters[name]) for name in self.adam}
        self.step_number = 0

    def state_dict(self) -> dict:
        """Everything `load_state_dict` needs."""
        return {"masters": self.masters, "first": self.first, "second": self.second, "step": self.step_number}

    def load_state_dict(self, state: dict) -> None:
        """Restore the masters, moments and step, and the model's bf16 weights with them."""
        self.masters, self.first, self.second = state["masters"], state["first"], state["second"]
        self.step_number = state["step"]
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(self.masters[name])

    def _split(self, name: str, g: Tensor) -> Tensor:
        """The stack of matrices to orthogonalise: query, key and value apart, the wide side last."""
        if name.endswith("query_key_value.weight"):
            parts = g.view(self.heads, 3, -1, g.shape[1]).transpose(0, 1)
            return parts.reshape(3, g.shape[1], g.shape[1])
        return (g.T if g.shape[0] > g.shape[1] else g)[None]

    def _join(self, name: str, update: Tensor, like: Tensor) -> Tensor:
        if name.endswith("query_key_value.weight"):
            return update.view(3, self.heads, -1, like.shape[1]).transpose(0, 1).reshape(like.shape)
        return update[0].T if like.shape[0] > like.shape[1] else update[0]

    @torch.no_grad()
    def step(self, gradients: dict[str, Tensor], factor: float) -> None:
        """One update at `factor` times the base learning rates; `gradients` (fp32) are used up."""
        self.step_number += 1
        momentum = min(0.85 + 0.1 * self.step_number / 300, 0.95)
        groups: dict[tuple[int, ...], list[tuple[str, Tensor]]] = {}
        for name in self.muon:
            grad = gradients[name]
            first = self.first[name].lerp_(grad, 1 - momentum)
            stack = self._split(name, grad.lerp(first, momentum))
            groups.setdefault(tuple(stack.shape[1:]), []).append((name, stack))
        for members in groups.values():
            names, stacks = zip(*members, strict=True)
            updates = orthogonalise(torch.cat(stacks)).split([stack.shape[0] for stack in stacks])
            for name, update in zip(names, updates, strict=True):
                master = self.masters[name]
                gain = math.sqrt(max(1.0, master.shape[0] / master.shape[1]))
                rate = self.cfg.muon_lr * factor
                master.mul_(1 - rate * self.cfg.weight_decay)
                master.sub_(self._join(name, update, master), alpha=rate * gain)
        self._adam(gradients, self.cfg.adam_lr * factor)
        self._publish()

    def _adam(
        self, gradients: dict[str, Tensor], rate: float, beta1: float = 0.9, beta2: float = 0.97, eps: float = 1e-8
    ) -> None:
        for name in self.adam:
            grad = gradients[name]
            first = self.first[name].lerp_(grad, 1 - beta1)
            second = self.second[name].lerp_(grad.square_(), 1 - beta2)
            scale = math.sqrt(1 - beta2**self.step_number) / (1 - beta1**self.step_number)
            self.masters[name].addcdiv_(first, second.sqrt().add_(eps), value=-rate * scale)


class Workers:
    """Gradients of a batch, its micro-batches shared out among single-threaded workers as they come free.

    On a busy machine this loses less than parallel loops inside each operator: nobody waits at a barrier per kernel.
    """

    def __init__(self, model: LeanBloom, cfg: TrainConfig) -> None:
        torch.set_num_threads(1)
        self.model, self.micro = model, cfg.micro
        self.names, self.parameters = zip(*model.named_parameters(), strict=True)
        count = cfg.threads or os.cpu_count() or 1
        self.pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))

    def _one(self, rows: Tensor) -> tuple[float, tuple[Tensor, ...]]:
        loss = self.model.loss(rows)
        return loss.item(), torch.autograd.grad(loss, self.parameters)

    def gradients(self, rows: Tensor) -> tuple[float, dict[str, Tensor]]:
        """The batch's mean loss and its fp32 gradients by parameter name."""
        parts, total = rows.split(self.micro), 0.0
        sums = [torch.zeros(p.shape) for p in self.parameters]
        for loss, grads in self.pool.map(self._one, parts):
            total += loss
            for accumulated, grad in zip(sums, grads, strict=True):
                accumulated.add_(grad, alpha=1 / len(parts))
        return total / len(parts), dict(zip(self.names, sums, strict=True))


class Stream:
    """Rows `[batch, length + 1]` from the packed token file, in order, round and round."""

    def __init__(self, path: Path, cfg: TrainConfig) -> None:
        self.tokens = np.memmap(path, dtype=np.uint16, mode="r")
        self.cfg, self.rows = cfg, (len(self.tokens) - 1) // cfg.length

    def batch(self, step: int) -> Tensor:
        """The rows of one step; rows overlap by the one token that is only a label."""
        size, length = self.cfg.batch, self.cfg.length
        starts = [(step * size + row) % self.rows * length for row in range(size)]
        return torch.from_numpy(np.stack([self.tokens[s : s + length + 1].astype(np.int64) for s in starts]))


def heldout_loss(model: LeanBloom, path: Path, length: int = 256, limit: int = 400) -> float:
    """Mean loss on up to `limit` rows of a held-out file."""
    tokens = np.fromfile(path, dtype=np.uint16).astype(np.int64)
    rows = min(limit, (len(tokens) - 1) // length)
    batches = torch.from_numpy(np.stack([tokens[r * length : r * length + length + 1] for r in range(rows)])).split(16)
    with torch.no_grad():
        return sum(model.loss(part).item() * len(part) for part in batches) / rows


def _save(work: Path, optimiser: Optimiser, spent: float) -> None:
    temporary = work / f"{CHECKPOINT}.new"
    torch.save({"optimiser": optimiser.state_dict(), "seconds": spent}, temporary)
    temporary.replace(work / CHECKPOINT)


def train(work: Path, cfg: TrainConfig) -> None:
    """Train, or go on training, until the budget is spent; logs to `train-log.jsonl`."""
    torch.manual_seed(0)
    model = LeanBloom(config()).bfloat16()
    optimiser, workers = Optimiser(model, cfg), Workers(model, cfg)
    seconds, stream = 0.0, Stream(work / "train.bin", cfg)
    if (work / CHECKPOINT).exists():
        state = torch.load(work / CHECKPOINT, weights_only=True)
        optimiser.load_state_dict(state["optimiser"])
        seconds = state["seconds"]
        print(f"resumed at step {optimiser.step_number}, {seconds:.0f} s", flush=True)
    started, per_step = time.monotonic() - seconds, cfg.batch * cfg.length
    saved = last = time.monotonic()
    running = 0.0
    while True:
        spent = time.monotonic() - started
        share = max(spent / (cfg.minutes * 60), optimiser.step_number * per_step / cfg.tokens)
        if share >= 1 or (cfg.max_steps and optimiser.step_number >= cfg.max_steps):
            break
        loss, gradients = workers.gradients(stream.batch(optimiser.step_number))
        optimiser.step(gradients, schedule(share, cfg))
        running += loss
        if optimiser.step_number % 20 == 0:
            now = time.monotonic()
            entry = {"step": optimiser.step_number, "loss": round(running / 20, 4), "share": round(share, 4)}
            entry |= {"tokens": optimiser.step_number * per_step, "rate": round(20 * per_step / (now - last))}
            with (work / "train-log.jsonl").open("a") as log:
                log.write(json.dumps(entry) + "\n")
            print(entry, flush=True)
            running, last = 0.0, now
        if time.monotonic() - saved > cfg.save_every:
            held = {lang: round(heldout_loss(model, work / f"heldout-{lang}.bin", limit=48), 4) for lang in ("en", "zh")}
            print(f"held-out {held}", flush=True)
            _save(work, optimiser, time.monotonic() - started)
            saved = time.monotonic()
    _save(work, optimiser, time.monotonic() - started)
