"""DeepSpeed's ZeRO-2: each process has a part of the adapter's gradients and of AdamW's moments, and updates that part.

The engine is given the trained parameters alone, not the model, so that passes, the frozen base (in whatever form) and files
are those of one process. What it keeps in parts is gathered where a checkpoint is written and cut where one is read.

Of ZeRO-3 the base is the rest: `divide` has DeepSpeed keep its blocks' weights in parts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import processes
from ..errors import UnsupportedError


def check_installed(strategy: str) -> None:
    """UnsupportedError where DeepSpeed is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UnsupportedError(
            f"training.strategy: {strategy} needs DeepSpeed, which is not installed: pip install deepspeed (on CPUs with "
            "DS_ACCELERATOR=cpu and DS_BUILD_OPS=0 set). ddp does without it and holds base and adapter whole; fsdp2 shares "
            "the base out, with training.shard_adapters the adapter, too."
        )


class Trained(nn.Module):
    """The parameters that DeepSpeed is given; a loss goes through it for the sake of the hooks on its way back."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.parameters_ = nn.ParameterList(parameters)

    def forward(self, loss: Tensor) -> Tensor:
        return loss


class Zero:
    """ZeRO-2 beside an optimizer, which keeps its groups and rates, and has states only within `whole` and until `take`.

    Args:
        optimizer: AdamW over trained parameters in fp32.
        highest: the norm that gradients are brought down to; 0: they are left.

    Raises:
        UnsupportedError: parameters in another precision, of which DeepSpeed would keep second ones.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, highest: float) -> None:
        import deepspeed

        self.optimizer = optimizer
        self.used = [i for i, group in enumerate(optimizer.param_groups) if group["params"]]  # DeepSpeed drops the others
        self.parameters = [list(optimizer.param_groups[i]["params"]) for i in self.used]
        every = [p for own in self.parameters for p in own]
        if other := {p.dtype for p in every} - {torch.float32}:
            raise UnsupportedError(
                f"ZeRO-2 and ZeRO-3 train adapters in fp32, and this one has {', '.join(map(str, other))}; use ddp"
            )
        kind: Any = type(optimizer)
        self.inner = kind(
            [optimizer.param_groups[i] | {"params": own} for i, own in zip(self.used, self.parameters, strict=True)]
        )
        numbers = sum(p.numel() for p in every)  # its default are buffers of 2 GB
        zero = {"stage": 2, "reduce_bucket_size": numbers, "overlap_comm": False}
        config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": highest, "zero_optimization": zero}
        self.engine, *_ = deepspeed.initialize(model=Trained(every), optimizer=self.inner, config=config)
        self.parts: list[Tensor] = [group["params"][0] for group in self.inner.param_groups]

    def backward(self, loss: Tensor, updates: bool) -> None:
        """Gradients of a loss are added to those before; where it `updates`, their mean over processes is taken, clipped
        and stepped by. All processes must call this."""
        self.engine.set_gradient_accumulation_boundary(updates)
        self.engine.backward(self.engine(loss), scale_wrt_gas=False)
        if updates:
            for i, group in zip(self.used, self.inner.param_groups, strict=True):
                group |= self.optimizer.param_groups[i] | {"params": group["params"]}
            self.engine.step()

    @property
    def norm(self) -> Tensor:
        """Of the last update's gradients, before they were clipped."""
        return torch.as_tensor(self.engine.get_global_grad_norm())

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within the block the optimizer has the states of whole parameters, as with one process. All processes must enter
        this."""
        for own, part in zip(self.parameters, self.parts, strict=True):
            self._gather(own, part)
        try:
            yield
        finally:
            self.optimizer.state.clear()

    def take(self) -> None:
        """Have this process's part of the states that were loaded into the optimizer."""
        for own, part in zip(self.parameters, self.parts, strict=True):
            self._cut(own, part)
        self.optimizer.state.clear()

    def _gather(self, own: list[nn.Parameter], part: Tensor) -> None:
        """States of parameters from those of the parts that their values lie in, one after the other."""
        for key, value in self.inner.state.get(part, {}).items():
            if value.shape == part.shape:
                whole, sizes = value.new_empty(value.numel() * processes.count()), [p.numel() for p in own]
                torch.distributed.all_gather(list(whole.chunk(processes.count())), value)
                values = whole[: sum(sizes)].split(sizes)
            else:
                values = (value,) * len(own)
            for p, v in zip(own, values, strict=True):
                self.optimizer.state[p][key] = v.view_as(p) if value.shape == part.shape else v.clone()

    def _cut(self, own: list[nn.Parameter], part: Tensor) -> None:
        """The other way round: this process's part of the states, filled up with zeros."""
        have = [self.optimizer.state[p] for p in own if p in self.optimizer.state]
        for key, value in have[0].items() if have else ():
            if value.shape == own[0].shape:
                flat = part.new_zeros(part.numel() * processes.count())
                torch.cat([h[key].flatten() for h in have], out=flat[: sum(p.numel() for p in own)])
                value = flat.chunk(processes.count())[processes.index()].clone()
            self.inner.state[part][key] = value

    def close(self) -> None:
        """Let the model's parameters go."""
        self.engine.destroy()


def divide(base: nn.Module, blocks: list[nn.Module]) -> Callable[[], None]:
    """ZeRO-3's part: each process keeps a part of each frozen weight of a base's blocks, and DeepSpeed gathers it for its
    module's passes and where another module of its block reads it. All processes must call this, and make the same passes.

    Whole stays what is outside of the blocks, and modules with a trained parameter of their own.

    Returns:
        what lets go of weights that a backward pass did not leave by a gradient, to be called behind each.
    """
    import deepspeed

    deepspeed.init_distributed()
    trained = {m for block in blocks for m in block.modules() if any(p.requires_grad for p in m.parameters(recurse=False))}
    with without(base, trained):
        every = nn.ModuleList(blocks)
        deepspeed.zero.Init(module=every, config_dict_or_path=STAGE_3)  # weight by weight: no device has all of them
        engine, *_ = deepspeed.initialize(model=every, config=STAGE_3)
        for block in blocks:
            within(block)
    return engine.optimizer.release_backward_leftovers


def within(block: nn.Module) -> None:
    """Gather a weight that any module reads while a block runs."""
    parameters: list[Any] = [m._parameters for m in block.modules()]

    def reading(flag: bool) -> None:
        for own in parameters:
            own._in_forward = flag

    block.register_forward_pre_hook(lambda *given: reading(True))
    block.register_forward_hook(lambda *given: reading(False), always_call=True)


STAGE_3 = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {
        "stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "memory_efficient_linear": False,
    },
}  # fmt: skip


@contextmanager
def without(module: nn.Module, left_out: set[nn.Module]) -> Iterator[None]:
    """Within the block a module's tree lacks some of its modules."""
    before = {m: dict(m._modules) for m in module.modules() if not left_out.isdisjoint(m._modules.values())}
    for m, children in before.items():
        for name in [name for name, child in children.items() if child in left_out]:
            del m._modules[name]
    try:
        yield
    finally:
        for m, children in before.items():  # in their order
            m._modules.clear()
            m._modules.update(children)
