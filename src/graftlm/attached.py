"""What is attached to a base model, and what it contributes at the entry points.

Shapes: B rows, P virtual tokens, K prefix entries, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .architectures import backbone_embeddings, is_plain, token_embeddings
from .layers import ModulesToSaveWrapper, saved_modules
from .methods import Method, PeftConfig
from .placing import Front
from .quantization import quantized_kind
from .routing import Group, Plan, Routes, Switch, active_routes, asking_for, planned_adapters, running

Memory = list[tuple[Tensor, Tensor]]
# What HF PEFT has one level below the wrapper; asked there, the wrapper answers.
OF_TUNER = frozenset(
    {
        "active_adapters", "add_weighted_adapter", "delete_adapter", "disable_adapter_layers",
        "enable_adapter_layers", "merge_adapter", "merge_and_unload", "peft_config", "prefix", "set_adapter",
        "set_requires_grad", "targeted_module_names", "targeted_parameter_names", "unload", "unmerge_adapter",
    }
)  # fmt: skip


class AdapterHost(nn.Module):
    """The level between wrapper and base, so that modules are found under `base_model.model.…` as with HF PEFT."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def update_and_allocate(self, global_step: int) -> None:
        """`PeftModel.update_and_allocate`, where HF PEFT has it."""
        for owner in _SETS.get(self.model, ()):
            if owner.base_model is self:
                owner.update_and_allocate(global_step)

    @property
    def active_adapter(self) -> str | list[str]:
        """HF PEFT's: at this level all active adapters, one by itself."""
        active = next(([*host.switch.active] for host in _SETS.get(self.model, ()) if host.base_model is self), [])
        return active[0] if len(active) == 1 else active

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            found = [host for host in _SETS.get(self.model, ()) if name in OF_TUNER and host.base_model is self]
            return getattr(found[0] if found else self.model, name)


class Attached(nn.Module):
    """A base and its adapters by name, as passes and methods read them; `adapters.AdapterSet` changes them."""

    entry: Any  # what passes do on the base, by hooks: where passes are run through it
    prompt_encoder: Any
    bottleneck: Any
    adapter_biases: Any

    def __init__(self, model: nn.Module, autocast_adapter_dtype: bool) -> None:
        nn.Module.__init__(self)
        self._modules["base_model"] = AdapterHost(model)
        self.switch = Switch()
        self.methods: dict[str, Method] = {}
        self.configs: dict[str, PeftConfig] = {}
        self.prompt_encoder = nn.ModuleDict()
        self.bottleneck = nn.ModuleDict()
        self.adapter_biases = nn.ModuleDict()
        self.autocast_adapter_dtype = autocast_adapter_dtype

    # -- what it is made of ------------------------------------------------------------------------------------------
    @property
    def base(self) -> Any:
        """The model that adapters are attached to: transformers', or any torch module."""
        return self.base_model.model

    @property
    def plain(self) -> bool:
        """Whether the base is no transformers model (see `is_plain`)."""
        return is_plain(self.base)

    def get_base_model(self) -> Any:
        """The model that adapters are attached to."""
        return self.base

    @property
    def base_model(self) -> AdapterHost:
        return self._modules["base_model"]  # type: ignore[return-value]

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Configurations by adapter name; what was read before follows what is attached."""
        self.configs.clear()
        self.configs.update((name, method.config) for name, method in self.methods.items())
        return self.configs

    @property
    def active_adapters(self) -> list[str]:
        return list(self.switch.active)

    @property
    def active_adapter(self) -> str:
        return self.switch.active[0] if self.switch.active else next(iter(self.methods), "default")

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter acts."""
        return self.switch.enabled and bool(self.switch.active)

    @property
    def task_type(self) -> Any:
        return self.methods[self.active_adapter].config.task_type if self.methods else None

    @property
    def word_embeddings(self) -> nn.Module:
        if self.plain:
            raise AttributeError(f"{type(self.base).__name__} is no transformers model: it has no embeddings of words.")
        return backbone_embeddings(self.base)

    @property
    def container_types(self) -> tuple[type, ...]:
        """Modules whose inside belongs to adapters."""
        return (ModulesToSaveWrapper,)

    @property
    def adapter_device(self) -> torch.device:
        embeddings = token_embeddings(self.base)
        return next(self.base.parameters()).device if embeddings is None else embeddings.weight.device

    def adapter_dtype(self, layer: Any = None) -> torch.dtype:
        """Dtype of new adapter tensors beside `layer`: its own, but fp32 for 16-bit (unless told otherwise) or packed."""
        weight = None if layer is None or quantized_kind(layer) is not None else getattr(layer, "weight", None)
        dtype = self._float_dtype() if weight is None else weight.dtype
        if not dtype.is_floating_point or (self.autocast_adapter_dtype and dtype in (torch.float16, torch.bfloat16)):
            return torch.float32
        return dtype

    def _float_dtype(self) -> torch.dtype:
        floats = (p.dtype for p in self.base.parameters() if p.is_floating_point() and type(p).__name__ != "Params4bit")
        return next(floats, torch.float32)

    def _compute_dtype(self) -> torch.dtype:
        kind = self.adapter_device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self._float_dtype()

    def adapter_parameters(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """All trained parameters of an adapter (its modules to save included), under their `state_dict` names."""
        yield from self.methods[name].named_parameters(self)
        for path, module in saved_modules(self.base, self.switch, name):
            for key, parameter in module.named_parameters():
                yield f"base_model.model.{path}.modules_to_save.{name}.{key}", parameter

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Run the base directly, without adapters and without gradients."""
        with torch.no_grad(), running(Plan(self.switch, ())):
            yield

    def active_now(self) -> tuple[str, ...]:
        """Adapters that apply now: those of the running plan, if it is this wrapper's. Hooks ask this; unlike LoRA's modules
        they do nothing when the base is called directly."""
        return planned_adapters(self.switch)

    def routes_now(self) -> Routes | None:
        """The routes of the running plan, if it is this wrapper's and its batch is mixed."""
        return active_routes(self.switch)

    # -- what the entry points ask -----------------------------------------------------------------------------------
    @property
    def has_memory(self) -> bool:
        return any(type(m).memory is not Method.memory for m in self.methods.values())

    @property
    def has_tasks(self) -> bool:
        return any(m.tasks for m in self.methods.values())

    def counts(self, group: Group) -> tuple[int, int]:
        """Number of virtual tokens and of prefix entries of a composition of adapters."""
        count = prefix = 0
        for name in group:
            method = self.methods[name]
            if type(method).memory is not Method.memory:
                prefix += method.config.num_virtual_tokens  # type: ignore[attr-defined]
            elif type(method).virtual_tokens is not Method.virtual_tokens:
                count += method.config.num_virtual_tokens  # type: ignore[attr-defined]
        return count, prefix

    def owners(self, plan: Plan) -> list[tuple[Attached, Group]]:
        """The compositions of adapters that take part, each with those whose adapters they are."""
        switches = plan.routes.switches if plan.routes is not None else None
        if switches is None:
            return [(self, group) for group in plan.groups]
        by_switch = {id(host.switch): host for host in _SETS[self.base]}
        return [(by_switch[id(switch)], group) for switch, group in zip(switches, plan.groups, strict=True)]

    def fronts(self, plan: Plan, batch: int) -> tuple[Front, Front]:
        """What stands in front of each of `batch` rows: virtual tokens, and a prefix."""
        counts, prefixes = zip(*(host.counts(group) for host, group in self.owners(plan)), strict=True)
        each = None if plan.routes is None else plan.routes.each(batch, self.adapter_device)
        return Front.of(list(counts), each), Front.of(list(prefixes), each)

    def in_front(self, plan: Plan) -> list[Group]:
        """Of the adapters of each row (one entry where all rows have the same) those with virtual tokens or a prefix."""
        if not any(any(self.counts(group)) for group in plan.groups if plan.routes is None or plan.routes.switches is None):
            return [()]
        found = []
        for group, task in zip(plan.by_row, plan.tasks_by_row, strict=True):
            names = [n for n in group if any(self.counts((n,)))]
            found.append(tuple(f"{n} (task {task})" if task is not None and self.methods[n].tasks else n for n in names))
        return found

    def virtual_tokens(self, group: Group) -> Tensor | None:
        """A composition's virtual tokens, side by side [P, H]; None for none."""
        parts = [t for n in group if (t := self.methods[n].virtual_tokens(self)) is not None]
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else None

    def decoder_front(self, plan: Plan, batch: int) -> Front:
        """How many virtual tokens stand in front of the decoder's part of each of `batch` rows."""
        counts = [sum(host.methods[n].decoder_count for n in group) for host, group in self.owners(plan)]
        return Front.of(counts, None if plan.routes is None else plan.routes.each(batch, self.adapter_device))

    def decoder_rows(self, plan: Plan, batch: int) -> Tensor:
        """These tokens [B, P, H], as `virtual_rows`."""
        return by_row(plan, batch, self.asked(plan, lambda host, group: host.decoder_tokens(group)))

    def decoder_tokens(self, group: Group) -> Tensor | None:
        parts = [t for n in group if (t := self.methods[n].decoder_tokens(self)) is not None]
        return torch.cat(parts) if parts else None

    def memory(self, group: Group) -> Memory | None:
        """A composition's prefixes, side by side: per layer (K, V) [kv_heads, K, head_dim] in the compute dtype."""
        found = [m for n in group if (m := self.methods[n].memory(self))]
        return side_by_side(found, self._compute_dtype()) if found else None

    def virtual_rows(self, plan: Plan, batch: int) -> Tensor:
        """Virtual tokens of `batch` rows [B, P, H]; a row with fewer has zeros in front of them."""
        return by_row(plan, batch, self.asked(plan, lambda host, group: host.virtual_tokens(group)))

    def asked(self, plan: Plan, question: Callable[[Attached, Group], Any]) -> list[Any]:
        """The answers of all who take part, each under its own random numbers."""
        found = []
        for i, (host, group) in enumerate(self.owners(plan)):
            task = plan.tasks[i] if plan.tasks else None
            with asking_for(task), nullcontext() if plan.routes is None else plan.routes.drawing(i):
                found.append(question(host, group))
        return found

    def memory_rows(self, plan: Plan, batch: int) -> Memory:
        """Prefixes per layer: [kv_heads, K, head_dim], or where rows differ [B, kv_heads, K, head_dim], zeros in front."""
        memories = self.asked(plan, lambda host, group: host.memory(group))
        if plan.routes is None:
            return memories[0]  # type: ignore[return-value]
        layers = range(len(next(m for m in memories if m is not None)))
        rows = [[by_row(plan, batch, [None if m is None else m[i][j] for m in memories]) for j in (0, 1)] for i in layers]
        return [(keys, values) for keys, values in rows]

    def has_encoder_memory(self, plan: Plan) -> bool:
        return any(getattr(self.methods[n].config, "prefix_in_encoder", False) for n in plan.adapters)

    def encoder_memory(self, plan: Plan) -> Memory | None:
        found = [m for n in plan.adapters if (m := self.methods[n].encoder_memory(self))]
        return side_by_side(found, self._compute_dtype()) if found else None


_SETS: WeakKeyDictionary[nn.Module, WeakSet[Any]] = WeakKeyDictionary()  # what stands over each base


def side_by_side(memories: list[Memory], dtype: torch.dtype) -> Memory:
    """The prefixes of a composition as one, in `dtype`: per layer (K, V) [kv_heads, K_i, head_dim] joined along K_i."""
    joined = (
        memories[0]
        if len(memories) == 1
        else [tuple(torch.cat(parts, dim=-2) for parts in zip(*layer, strict=True)) for layer in zip(*memories, strict=True)]
    )
    return [(k.to(dtype), v.to(dtype)) for k, v in joined]


def by_row(plan: Plan, batch: int, tables: list[Tensor | None]) -> Tensor:
    """Tables [..., P_i, W], one a group (None: empty), for each of `batch` rows [B, ..., P, W], zeros in front."""
    like = next(t for t in tables if t is not None)
    if plan.routes is None:
        return like.expand(batch, *like.shape)
    most = max(t.shape[-2] for t in tables if t is not None)
    none = like.new_zeros(*like.shape[:-2], most, like.shape[-1])
    filled = [none if t is None else F.pad(t, (0, 0, most - t.shape[-2], 0)) for t in tables]
    return torch.stack(filled)[plan.routes.each(batch, like.device)]
