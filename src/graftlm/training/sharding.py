"""The frozen base in parts, one a process. FSDP2: the adapters whole in every process, or in parts as well (`parts`).

torch's `fully_shard` gathers a block's weights when a pass reaches it and drops them behind it. Embeddings, the last norm
and the head stay whole: `fully_shard` would hold them from the forward to the end of the backward pass too. Adapters that
are whole stay plain tensors, so files, checkpoints and the optimizer are those of one process; `Exchange` takes their
gradients' mean. DeepSpeed's ZeRO-3 keeps parts of the same weights (`zero.divide`), beside adapters by its ZeRO-2.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from .. import fingerprint, processes
from ..architectures import base_modules
from ..errors import UnsupportedError
from ..kernels import return_freed_memory
from ..methods.base import Method
from ..quantization import scheme_of
from .parts import Parts
from .zero import check_installed, divide

IN_PARTS = ("fsdp2", "zero3")  # strategies by which a process holds a part of the base
BY_ZERO = ("zero2", "zero3")  # those by which DeepSpeed updates adapters


def check_strategy(strategy: str, given: bool, together: bool, count: int | None = None) -> None:
    """Refuse what this run cannot be shared out by.

    Args:
        given: the base came loaded, and is to be given back as it was.
        together: the run shares its passes with others.
        count: of processes, where they are planned; else those that run.

    Raises:
        UnsupportedError: fsdp2, zero2 or zero3 with what it is not for; the latter two without DeepSpeed; DeepSpeed or FSDP
            by accelerate's settings.
    """
    for variable, name in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "FSDP")):
        if os.environ.get(variable, "false").lower() in ("1", "true"):
            raise UnsupportedError(
                f"{name} set by accelerate does not train adapters here: its checkpoints would not be those of one "
                "process. Use training.strategy: zero2, zero3 or fsdp2. Start the processes by torchrun, graftlm train "
                "--processes, or accelerate launch --multi_gpu."
            )
    several = (count or processes.count()) > 1
    if strategy == "zero2" and several and together:
        raise UnsupportedError(
            "training.strategy: zero2 is for a run that trains alone: runs that train together make their passes beside "
            "DeepSpeed. Use strategy: ddp, or run one recipe at a time."
        )
    if strategy in IN_PARTS and several and (given or together):
        raise UnsupportedError(
            f"training.strategy: {strategy} is for a run that loads its own base and trains alone: "
            + ("runs that train together share one whole base" if together else "a loaded base would come back in parts")
            + ". Use strategy: ddp, or run one recipe at a time."
        )
    if strategy in BY_ZERO and several and count is None:
        check_installed(strategy)


def check_scheme(scheme: str | None, strategy: str = "fsdp2") -> None:
    """UnsupportedError for a base that cannot be in parts: a quantised one."""
    if scheme is not None:
        raise UnsupportedError(
            f"training.strategy: {strategy} cannot hold a base in {scheme}: its layers keep scales beside their packed "
            "weights, which are not shared out. Use strategy: ddp (each process holds the quantised base), or leave "
            "quantization out."
        )


def check_adapters(model: Any, wanted: str = "shard_adapters") -> None:
    """UnsupportedError for adapters whose parameters are looked at whole after each step, which `wanted` does not have."""
    for name in model.switch.active:
        method = model.methods[name]
        if type(method).after_step is not Method.after_step:
            raise UnsupportedError(
                f"training.{wanted}: {method.config.peft_type.value} chooses its ranks by whole matrices after each step, "
                "which no process has there. Use strategy: ddp, or fsdp2 without shard_adapters; every other method can be "
                "in parts."
            )


def share_out(model: Any, strategy: str, adapters: bool) -> Callable[[], None] | None:
    """Have a wrapped base, and the adapter where wanted, shared out as a strategy does it; nothing for one process.

    Returns:
        what must be called behind each backward pass, if anything.
    """
    if processes.count() == 1:
        return None
    if strategy == "fsdp2":
        shard(model, adapters)
    elif strategy == "zero2":
        check_adapters(model, "strategy: zero2")
    return shard_by_zero(model) if strategy == "zero3" else None


def shard(model: Any, adapters: bool = False) -> None:
    """Share a wrapped base's weights out to the processes of this run, block by block, each to its own device, so that no
    device ever has all of them. All processes must call this.

    Args:
        adapters: and the adapters' parameters in these blocks.

    Raises:
        UnsupportedError: a quantised base; adapters that are looked at whole between passes (AdaLoRA's).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    base = model.base
    check_scheme(scheme_of(base))
    if adapters:
        check_adapters(model)
    fingerprint.keep(base)
    device = PartialState().device
    mesh = init_device_mesh(device.type, (processes.count(),))
    own = set(base_parameters(base))
    found = list(stacks(base))
    inside = Counter(p for _, blocks in found for block in blocks for p in block.parameters())
    shared = {p for p, times in inside.items() if p in own or (adapters and p.requires_grad and p.dim() and times == 1)}
    for stack, blocks in found:
        for module in (*blocks, stack):
            fully_shard(module, mesh=mesh, ignored_params=set(model.parameters()) - shared)
    for block in (block for _, blocks in found for block in blocks):
        # once outside of inference mode: what is gathered into stays, and training writes to it, too
        block.unshard()  # type: ignore[operator]
        block.reshard()  # type: ignore[operator]
    move_rest(model, device)


def shard_by_zero(model: Any) -> Callable[[], None]:
    """As `shard`, by DeepSpeed's ZeRO-3, without adapters. All processes must call this.

    Returns:
        what must be called behind each backward pass.

    Raises:
        UnsupportedError: a quantised base; adapters that are looked at whole between passes (AdaLoRA's).
    """
    base = model.base
    check_scheme(scheme_of(base), "zero3")
    check_adapters(model, "strategy: zero3")
    fingerprint.keep(base)
    release = divide(base, [block for _, blocks in stacks(base) for block in blocks])
    move_rest(model, PartialState().device)
    return release


def move_rest(model: Any, device: torch.device) -> None:
    """Bring what is not in parts to a process's device."""
    return_freed_memory()
    for tensor in (*model.parameters(), *model.buffers()):
        if in_part(tensor) is None:
            tensor.data = tensor.data.to(device)


def in_part(tensor: Any) -> int | None:
    """How many numbers a tensor has in all processes together, where this one has a part of it; None where it is whole."""
    return tensor.numel() if hasattr(tensor, "placements") else getattr(tensor, "ds_numel", None)


def is_sharded(model: Any) -> bool:
    """Whether a wrapper's base went through `shard`."""
    from torch.distributed.fsdp import FSDPModule

    base = getattr(model, "base", None)
    return base is not None and any(isinstance(m, FSDPModule) for m in base.modules())


def base_parameters(base: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a base, without its adapters'."""
    for _, module in base_modules(base):
        yield from module.parameters(recurse=False)


def stacks(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """The modules of a base that run its transformer blocks, and these."""
    lists = [child for child in module.children() if isinstance(child, nn.ModuleList)]
    if lists:
        yield module, [block for one in lists for block in one]
    for child in module.children():
        if child not in lists:
            yield from stacks(child)


class Exchange:
    """The mean of adapters' gradients over all processes, where nothing else takes it: one collective for each dtype. Of
    adapters in parts `fully_shard` takes it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parts = Parts(model)

    @property
    def trained(self) -> list[nn.Parameter]:
        """The trained parameters that every process has whole."""
        return [p for p in self.model.parameters() if p.requires_grad and not hasattr(p, "placements")]

    def __call__(self) -> None:
        """All processes must call this after the same backward pass."""
        parameters = self.trained
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        for dtype in dict.fromkeys(p.dtype for p in parameters):  # in one order on all: a set's is by address
            grads: list[Tensor] = [p.grad for p in parameters if p.dtype is dtype]  # type: ignore[misc]
            flat = torch.cat([g.flatten() for g in grads])
            torch.distributed.all_reduce(flat)
            for gradient, mean in zip(grads, flat.div_(processes.count()).split([g.numel() for g in grads]), strict=True):
                gradient.copy_(mean.view_as(gradient))
        self.parts.hand_over()

    def clip(self, parameters: Any, highest: float, *given: Any) -> Tensor:
        """`Accelerator.clip_grad_norm_` where adapters are in parts."""
        return self.parts.clip([p.grad for p in self.trained if p.grad is not None], highest)


def traffic(model: Any) -> dict[str, int]:
    """What a process exchanges with the others, in bytes: `gradient_bytes` of adapters an update, and `gathered_bytes` of
    weights in parts that it gets in one pass, forward and backward. Empty for one process."""
    if processes.count() == 1:
        return {}
    whole = sum((in_part(p) or 0) * p.element_size() for p in model.parameters())
    return {
        "processes": processes.count(),
        "gradient_bytes": sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad),
        "gathered_bytes": 2 * whole * (processes.count() - 1) // processes.count(),
    }


def in_words(e: dict[str, int]) -> str:
    """A line about `traffic`."""
    base = f", and {e['gathered_bytes']:,} bytes of weights gathered a pass" if e["gathered_bytes"] else ""
    return f"{e['processes']} processes: gradients of {e['gradient_bytes']:,} bytes exchanged an update{base}."
