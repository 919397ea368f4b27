"""A pass of the real engine over tensors that have shapes and no values, with an account of what is alive.

Parameters and activations are torch's fake tensors; token ids, masks and places are small and stay real, so that whatever
depends on the data (packing, the lengths of sequences) happens as in the run. The account counts storages, not tensors:
views cost nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from .allocators import Event

node_count = torch.autograd._get_sequence_nr  # of nodes that this thread has made
_DEVICE_OF = torch.ops.prim.device.default
ADDED = ("aten::addmm_", "aten::baddbmm_")  # products in place, which torch's counter does not know


class Account(TorchDispatchMode):
    """Within the block, operations on fake tensors are made by shape, and storages that come and go are counted.

    Attributes:
        live, highest: bytes that are alive now, and were at most.
        events: storages, and nodes of autograd's graph, in the order in which they came and went (see `allocators`).
        operations: of products (torch's `flop_counter`, and `ADDED`).
        moved: bytes that all else reads and writes.
        calls: operations on tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.device = torch.device("cpu")
        self.live = self.highest = 0
        self.events: list[Event] = []
        self.operations = self.moved = self.calls = 0
        self._seen: dict[int, Any] = {}
        self._made = node_count()
        self._nodes: list[int] = []  # of the graph
        self._again: list[int] = []  # of activations that are computed again in the backward pass
        self._running: Any = None  # the node for which they are

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE_OF:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else args[0].device
        self.note_nodes()
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(x.device.type == "meta" and not isinstance(x, FakeTensor) for x in given):  # made with the base, no buffer
            args, kwargs = tree_map_only(Tensor, self._of_meta, (args, kwargs))
        elif given and not any(isinstance(x, FakeTensor) for x in given):
            return func(*args, **kwargs)
        with self.fake:
            made = func(*args, **kwargs)
        if not given and isinstance(made, Tensor) and not made.is_floating_point() and made.device.type == "cpu":
            return func(*args, **kwargs)  # ids, places, masks
        self.count(func, args, kwargs, given, made)
        for x in tree_leaves(made):
            if isinstance(x, FakeTensor):
                self.note(x)
        return made

    def count(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], made: Any) -> None:
        """Count the work of an operation."""
        self.calls += 1
        if (flops := flop_registry.get(func._overloadpacket)) is not None:
            self.operations += flops(*args, **kwargs, out_val=made)
            return
        if func._schema.name in ADDED:
            self.operations += 2 * made.numel() * args[1].shape[-1]
            return
        known = {id(x.untyped_storage()) for x in given}
        new = [x for x in tree_leaves(made) if isinstance(x, Tensor) and id(x.untyped_storage()) not in known]
        if new or func._schema.is_mutable:  # no view
            self.moved += sum(x.numel() * x.element_size() for x in [*given, *(new or given[:1])])

    def note_nodes(self) -> None:
        """Count nodes that came since. They stay to the end of the backward pass; those of activations that are computed
        again for a node of it, as long as it runs."""
        running = torch._C._current_autograd_node()
        if running is not self._running:
            self._go(self._again)
            self._running = running
        made, self._made = self._made, node_count()
        new = [-number - 1 for number in range(made, self._made)]
        (self._nodes if running is None else self._again).extend(new)
        self.events += [(number, 1) for number in new]

    def end_graph(self) -> None:
        """The graph goes."""
        self.note_nodes()
        self._go(self._nodes)

    def _go(self, nodes: list[int]) -> None:
        self.events += [(number, -1) for number in nodes]
        nodes.clear()

    def note(self, tensor: Tensor) -> None:
        """Count a tensor's storage, if it is new."""
        storage = tensor.untyped_storage()
        if id(storage) in self._seen:
            return
        size, number = storage.nbytes(), len(self.events)
        self._seen[id(storage)] = weakref.finalize(storage, self._gone, id(storage), number, size)
        self.live += size
        if size:
            self.events.append((number, size))
        self.highest = max(self.highest, self.live)

    def _gone(self, place: int, number: int, size: int) -> None:
        del self._seen[place]
        self.live -= size
        if size:
            self.events.append((number, -size))

    def take(self, model: nn.Module) -> None:
        """Turn a meta model's parameters, buffers and quantised values into fake tensors, which are counted."""
        memo: dict[int, tuple[Tensor, Tensor]] = {}
        for module in model.modules():
            holders: list[dict[str, Any]] = [module._parameters, module._buffers]  # type: ignore[list-item]
            for held in holders:
                for name, value in held.items():
                    if value is not None:
                        held[name] = self._faked(value, memo)
            state = getattr(module._parameters.get("weight"), "quant_state", None)
            for owner in [state, getattr(state, "state2", None), getattr(module, "state", None)]:
                for name, value in list(vars(owner).items()) if hasattr(owner, "__dict__") else ():
                    if isinstance(value, Tensor):
                        setattr(owner, name, self._faked(value, memo))
        for value, _ in memo.values():
            self.note(value)

    def _faked(self, value: Tensor, memo: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
        if isinstance(value, FakeTensor):
            return value
        if id(value) not in memo:
            made: Any = FakeTensor(self.fake, value.detach().to("meta"), self.device)
            if isinstance(value, nn.Parameter):
                kind = type(value)
                made = nn.Parameter(made, requires_grad=value.requires_grad)
                if kind is not nn.Parameter:  # bitsandbytes'
                    made.__class__ = type(kind.__name__, (type(made),), {"__module__": kind.__module__})
                made.__dict__.update(vars(value))
            memo[id(value)] = made, value
        return memo[id(value)][0]

    def _of_meta(self, value: Tensor) -> Tensor:
        if isinstance(value, FakeTensor) or value.device.type != "meta":
            return value
        return FakeTensor(self.fake, value, self.device)

    @contextmanager
    def peak(self) -> Iterator[list[int]]:
        """The highest that was alive within the block, filled in at its end."""
        before, self.highest, found = self.highest, self.live, [0]
        try:
            yield found
        finally:
            found[0] = self.highest
            self.highest = max(before, self.highest)
