"""Both libraries over one set of weights, one step of each in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from workloads import Workload, batch, load, sharing, synchronize, wrap


class Runner:
    """Steps of one library."""

    def __init__(self, library: str, model: Any, inputs: dict[str, Any], one_by_one: bool) -> None:
        import torch

        self.library, self.model = library, model
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.parts = [inputs]
        if one_by_one:
            items = inputs["num_items_in_batch"]
            rows = len(inputs["labels"])
            self.parts = [self.alone(inputs, i) | {"num_items_in_batch": items} for i in range(rows)]
            if library == "graftlm":  # as GraftLM's Trainer takes them
                self.parts = joined(self.parts)
        self.adamw = {f: torch.optim.AdamW(self.trained, lr=1e-4, fused=f or None) for f in (False, True)}

    @staticmethod
    def alone(inputs: dict[str, Any], row: int) -> dict[str, Any]:
        """One row without its padding."""
        kept = inputs["attention_mask"][row].bool()
        return {k: v[row : row + 1, kept] for k, v in inputs.items() if k != "num_items_in_batch"}

    def backward(self) -> float:
        total = 0.0
        for part in self.parts:
            loss = self.model(**part).loss
            loss.backward()
            total += loss.item()
        return total

    def gradients(self) -> tuple[float, Any]:
        """Loss and all gradients in one row."""
        import torch

        self.model.zero_grad()
        loss = self.backward()
        found = torch.cat([p.grad.double().flatten() for p in self.trained])
        self.model.zero_grad()
        return loss, found

    def step(self, *optimisers: bool) -> list[float]:
        """Seconds of forward and backward, and of each optimiser (fused or not) with these gradients; the fused one's."""
        start = time.perf_counter()
        self.backward()
        synchronize()
        found = [time.perf_counter() - start]
        for fused in optimisers or (True,):
            start = time.perf_counter()
            self.adamw[fused].step()
            synchronize()
            found.append(time.perf_counter() - start)
        self.model.zero_grad()
        return found


def joined(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The batches of one update as GraftLM's Trainer joins them."""
    from graftlm.training.joining import Joiner

    joiner, items, made = Joiner(), parts[0]["num_items_in_batch"], []
    for i, part in enumerate(parts):
        batch = {k: v for k, v in part.items() if k != "num_items_in_batch"}
        made += joiner.add(batch, last=i == len(parts) - 1)
    return [m | {"num_items_in_batch": items} for m in made]


class Incomparable(Exception):
    """HF PEFT makes an adapter that does not fit the model (Falcon's one key-value head under a prefix)."""


def pair(work: Workload, dtype: Any, folder: str | None) -> tuple[Runner, Runner]:
    """HF PEFT and GraftLM over one set of weights, with the same adapter values."""
    import peft

    import graftlm

    base = load(work, dtype, folder)
    other = load(work, dtype, folder) if work.quantized else sharing(base)
    vocabulary = base.config.vocab_size
    theirs, ours = wrap(peft, base, work), wrap(graftlm, other, work)
    values = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            value = values.pop(name).data
            if value.shape != parameter.shape:
                shapes = tuple(value.shape), tuple(parameter.shape)
                raise Incomparable(f"HF PEFT's {name} is {shapes[0]} where the model needs {shapes[1]}")
            parameter.data.copy_(value)
            if "lora_B" in name:
                parameter.data.normal_(0, 0.02)
    assert not values, f"HF PEFT trains more: {sorted(values)}"
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(dict(ours.named_parameters())[name].data)
    inputs = batch(work, vocabulary)
    if work.accumulate:
        inputs["num_items_in_batch"] = (inputs["labels"][:, 1:] != -100).sum()
    return Runner("peft", theirs, inputs, work.accumulate), Runner("graftlm", ours, inputs, work.accumulate)


def without_dropout(model: Any) -> Callable[[], None]:
    """Switch all dropout off; returns what puts it back."""
    import torch

    undo = []
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if (
                isinstance(value, float)
                and value
                and (name == "dropout" or (name == "p" and isinstance(module, torch.nn.Dropout)))
            ):
                undo.append((module, name, value))
                setattr(module, name, 0.0)
    return lambda: [setattr(*u) for u in undo] and None


def compare(theirs: Runner, ours: Runner) -> dict[str, float]:
    """Relative differences of loss and gradients, dropout off; and of HF PEFT's gradients with one more place of padding.

    The last is what rounding alone does: where an activation has a kink (OPT's ReLU), an input that is rounded to the other
    side of it switches a whole gradient on or off.
    """
    undo = [without_dropout(r.model) for r in (theirs, ours)]
    (loss, gradient), (own_loss, own_gradient) = theirs.gradients(), ours.gradients()
    parts, theirs.parts = theirs.parts, [wider(part) for part in theirs.parts]
    again = theirs.gradients()[1]
    theirs.parts = parts
    for put_back in undo:
        put_back()
    length = gradient.norm()
    return {
        "loss": abs(own_loss - loss) / abs(loss),
        "gradient": float((own_gradient - gradient).norm() / length),
        "rounding": float((again - gradient).norm() / length),
    }


def wider(part: dict[str, Any]) -> dict[str, Any]:
    """The same rows with one more place of padding, on the right."""
    import torch.nn.functional as F

    filler = {"input_ids": 3, "attention_mask": 0, "labels": -100}
    return {k: F.pad(v, (0, 1), value=filler[k]) if k in filler else v for k, v in part.items()}


def alternate(theirs: Runner, ours: Runner, work: Workload, rounds: int) -> dict[str, list[float]]:
    """Seconds of each part, one step of each library in turn after one to warm up."""
    times: dict[str, list[float]] = {k: [] for k in ("peft", "peft adamw", "peft fused", "graftlm", "graftlm fused")}
    for round_ in range(rounds + 1):
        allocator(kept=False)
        theirs.backward()  # not timed: the allocator settles
        passes, *optimisers = theirs.step(not work.plain_adamw, True)
        allocator(kept=True)
        ours.backward()
        own = ours.step()
        if round_:
            for key, seconds in zip(times, (passes, *optimisers, *own), strict=True):
                times[key].append(seconds)
    return times


def allocator(kept: bool) -> None:
    """glibc's thresholds as GraftLM sets them, or as a process has them: each library is measured under its own."""
    import ctypes

    try:
        library = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    for option, values in ((-3, (2**30, 2**25)), (-1, (2**31 - 1, 2**26)), (-2, (2**26, 2**17))):
        library.mallopt(option, values[not kept])
    if not kept:
        library.malloc_trim(0)


def kept_weights(model: Any, packed: bool) -> AbstractContextManager:
    """GraftLM's weights as the processor multiplies by them fastest, if asked for."""
    if not packed:
        return nullcontext()
    import graftlm

    return graftlm.prepacked(model)
