"""Adapters in parts, one a process, where FSDP2 shares them out with the blocks that they are in.

`fully_shard` makes DTensors of such parameters, gathers them for a block's pass, and hands each process its part of the
gradients' mean. What trains and saves them sees plain tensors all the same: the optimizer those parts (`local`), files and
checkpoints the whole (`whole`, `whole_states`), so that both are those of one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Part(NamedTuple):
    """A trained parameter by its place, and this process's part of it as the optimizer has it (the same memory)."""

    module: nn.Module
    name: str
    shared: Any  # a DTensor
    local: nn.Parameter

    def cut(self, value: Tensor) -> Tensor:
        """This process's part of a tensor that all have whole."""
        from torch.distributed.tensor import distribute_tensor

        mesh = self.shared.device_mesh
        return distribute_tensor(value, mesh, self.shared.placements, src_data_rank=None).to_local()

    def gather(self, part: Tensor) -> Tensor:
        """The tensor that all processes have such a part of; all must call this."""
        from torch.distributed.tensor import DTensor

        like = self.shared
        made = DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
        return made.full_tensor()


class Parts:
    """The trained parameters of a model that are in parts; all methods but `hand_over` must be called by all processes."""

    def __init__(self, model: nn.Module) -> None:
        from torch.distributed.tensor import DTensor

        self.found = [
            Part(module, name, p, nn.Parameter(p.detach().to_local()))  # type: ignore[union-attr]
            for module in model.modules()
            for name, p in module._parameters.items()
            if isinstance(p, DTensor) and p.requires_grad
        ]

    @contextmanager
    def local(self) -> Iterator[None]:
        """Within the block the model has this process's parts."""
        with self._instead([part.local for part in self.found]):
            yield

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within the block the model has whole tensors; what is written to them is kept."""
        values = [nn.Parameter(part.gather(part.local.detach())) for part in self.found]
        with self._instead(values):
            yield
        for part, value in zip(self.found, values, strict=True):
            part.local.data.copy_(part.cut(value.detach()))

    @contextmanager
    def _instead(self, values: Sequence[nn.Parameter]) -> Iterator[None]:
        for part, value in zip(self.found, values, strict=True):
            part.module._parameters[part.name] = value
        try:
            yield
        finally:
            for part in self.found:
                part.module._parameters[part.name] = part.shared

    def hand_over(self) -> None:
        """Give the optimizer the gradients of this process's parts."""
        for part in self.found:
            given = part.shared.grad
            part.local.grad = torch.zeros_like(part.local) if given is None else given.to_local()
            part.shared.grad = None

    # -- the optimizer -----------------------------------------------------------------------------------------------
    def clip(self, others: Sequence[Tensor], highest: float) -> Tensor:
        """The norm of all gradients, those of `others` among them (every process has them); these are brought down to
        `highest`."""
        own = [part.local.grad for part in self.found if part.local.grad is not None]
        square = torch.stack([g.double().pow(2).sum() for g in own]).sum()
        torch.distributed.all_reduce(square)
        norm = torch.stack([square, *(g.double().pow(2).sum() for g in others)]).sum().sqrt()
        factor = (highest / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        for gradient in (*own, *others):
            gradient.mul_(factor.to(gradient.dtype))
        return norm.float()

    @contextmanager
    def whole_states(self, states: Any) -> Iterator[None]:
        """Within the block an optimizer's states are those of whole parameters."""
        kept = {part.local: states[part.local] for part in self.found if part.local in states}
        for part in self.found:
            if part.local in kept:
                own = kept[part.local].items()
                states[part.local] = {k: part.gather(v) if is_like(v, part.local) else v for k, v in own}
        try:
            yield
        finally:
            states.update(kept)

    def cut_states(self, optimizer: torch.optim.Optimizer, stored: dict[str, Any]) -> dict[str, Any]:
        """Stored states of whole parameters, as this process's parts have them (a hook of `load_state_dict`)."""
        parts = {id(part.local): part for part in self.found}
        made = dict(stored["state"])
        for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            if (part := parts.get(id(p))) is not None and i in made:
                made[i] = {k: part.cut(v) if is_like(v, part.shared) else v for k, v in made[i].items()}
        return stored | {"state": made}


def is_like(value: Any, parameter: Tensor) -> bool:
    """Whether a state has a number for each of a parameter's."""
    return isinstance(value, Tensor) and value.shape == parameter.shape
