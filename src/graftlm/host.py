"""What adapters hang on: the base model, its adapters by name, which are switched on, and what the entry points ask.

Methods and entry points talk to this part (they call it the *host*); `model.PeftModel` adds what users call.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from .architectures import backbone_embeddings, base_modules, token_embeddings
from .architectures.fast import speed_up
from .bundled import known_as
from .entry import Entry
from .errors import AdapterError, nearest
from .layers import ModulesToSaveWrapper, find_modules, saved_modules
from .methods import Method, PeftConfig, method_for
from .methods.base import TASK_HEADS, clean_path, replace_module
from .preparation import freeze_base
from .quantization import quantized_kind, settle
from .routing import BASE_NAME, Front, Group, Plan, Routes, Switch, active_routes, planned_adapters, running

Memory = list[tuple[Tensor, Tensor]]


class AdapterHost(nn.Module):
    """The level between wrapper and base, so that modules are found under `base_model.model.…` as with HF PEFT."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


class Host(PreTrainedModel):
    """A frozen base model and its adapters. See `model.PeftModel`, its only subclass, for the arguments."""

    prompt_encoder: Any
    bottleneck: Any
    adapter_biases: Any

    def __init__(self, model: nn.Module, autocast_adapter_dtype: bool) -> None:
        nn.Module.__init__(self)
        self._modules["base_model"] = AdapterHost(model)
        self.switch = Switch()
        self.methods: dict[str, Method] = {}
        self.prompt_encoder = nn.ModuleDict()
        self.bottleneck = nn.ModuleDict()
        self.adapter_biases = nn.ModuleDict()
        self.autocast_adapter_dtype = autocast_adapter_dtype
        self.card_metrics: dict[str, Any] = {}
        self.handles: list[Any] = []
        self.checkpointing: list[nn.Module] | None = None
        self.foreign: set[int] | None = None  # other wrappers' parameters, until adapters come or go
        self.lean = self.packs = True
        self.mixes: set[str] = set()  # kinds of adapters that were tried out in a mixed batch
        self.mixed: set[tuple[Method, ...]] = set()  # and compositions of such kinds
        self.train(model.training)
        freeze_base(model)
        settle(model)

    # -- what it is made of ------------------------------------------------------------------------------------------
    @property
    def base(self) -> Any:
        """The transformers model."""
        return self.base_model.model

    def get_base_model(self) -> Any:
        """The transformers model."""
        return self.base

    @property
    def base_model(self) -> AdapterHost:  # type: ignore[override]
        return self._modules["base_model"]  # type: ignore[return-value]

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Configurations by adapter name."""
        return {name: method.config for name, method in self.methods.items()}

    @property
    def active_adapters(self) -> list[str]:
        return list(self.switch.active)

    @property
    def active_adapter(self) -> str:
        return self.switch.active[0] if self.switch.active else next(iter(self.methods), "default")

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.methods[self.active_adapter].config

    @property
    def peft_type(self) -> Any:
        return self.active_peft_config.peft_type

    @property
    def task_type(self) -> Any:
        return self.active_peft_config.task_type if self.methods else None

    @property
    def word_embeddings(self) -> nn.Module:
        return backbone_embeddings(self.base)

    @property
    def modules_to_save(self) -> set[str] | None:
        names = {n for c in self.peft_config.values() for n in getattr(c, "modules_to_save", None) or ()}
        return names or None

    @property
    def container_types(self) -> tuple[type, ...]:
        """Modules whose inside belongs to adapters."""
        return (ModulesToSaveWrapper,)

    @property
    def _hf_peft_config_loaded(self) -> bool:  # a plain Trainer lets a quantised model with adapters pass by this
        return True

    @property
    def adapter_device(self) -> torch.device:
        embeddings = token_embeddings(self.base)
        return next(self.base.parameters()).device if embeddings is None else embeddings.weight.device

    def adapter_dtype(self, layer: Any = None) -> torch.dtype:
        """Dtype of new adapter tensors beside `layer`: its own, but fp32 for 16-bit (unless told otherwise) or packed."""
        weight = getattr(layer, "weight", None) if layer is not None else None
        dtype = (
            weight.dtype
            if layer is not None and weight is not None and quantized_kind(layer) is None
            else self._float_dtype()
        )
        if not dtype.is_floating_point or (self.autocast_adapter_dtype and dtype in (torch.float16, torch.bfloat16)):
            return torch.float32
        return dtype

    def _float_dtype(self) -> torch.dtype:
        floats = (p.dtype for p in self.base.parameters() if p.is_floating_point() and type(p).__name__ != "Params4bit")
        return next(floats, torch.float32)

    # -- attaching ---------------------------------------------------------------------------------------------------
    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool | None = None,
    ) -> None:
        """Attach a new, untrained adapter. It becomes active by `set_adapter`.

        Args:
            low_cpu_mem_usage: HF PEFT's; without meaning here.
            autocast_adapter_dtype: keep this adapter in fp32 over a 16-bit base; the wrapper's own choice where None.

        Raises:
            AdapterError: the name is taken or cannot be used.
        """
        with self.casting(autocast_adapter_dtype):
            self._attach(adapter_name, peft_config)
        self._update_requires_grad([adapter_name])

    @contextmanager
    def casting(self, autocast_adapter_dtype: bool | None) -> Iterator[None]:
        """Within the block new adapters of a 16-bit base are kept in fp32, or not; None leaves that as it is."""
        before = self.autocast_adapter_dtype
        self.autocast_adapter_dtype = before if autocast_adapter_dtype is None else autocast_adapter_dtype
        try:
            yield
        finally:
            self.autocast_adapter_dtype = before

    def _attach(self, name: str, config: PeftConfig, *, for_loading: bool = False) -> None:
        if name in self.methods:
            raise AdapterError(f"There is an adapter {name!r} already. Delete it first, or choose another name.")
        reserved = not isinstance(name, str) or name == BASE_NAME or hasattr(nn.ModuleDict(), name)
        if reserved or not name or "." in name or "/" in name:
            raise AdapterError(
                f"{name!r} cannot name an adapter: expected a word without '.' and '/', not {BASE_NAME!r}, and not "
                "what torch calls something in its modules (such as 'half' or 'keys')."
            )
        method = method_for(config, name)
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = known_as(getattr(self.base, "name_or_path", None) or None)
        try:
            self._save_modules(name, config)
            method.attach(self, for_loading=for_loading)
        except Exception:
            self._unsave_modules(name)
            raise
        self.methods[name] = method
        self._connect()
        self._reconnect_others()

    def _save_modules(self, name: str, config: PeftConfig) -> None:
        """Give the adapter its own copies of the modules that it trains in full."""
        wanted = list(dict.fromkeys(getattr(config, "modules_to_save", None) or ()))
        heads = TASK_HEADS.get(config.task_type, ())  # type: ignore[call-overload]
        entries = list(dict.fromkeys([*wanted, *heads]))
        if not entries:
            return
        config.modules_to_save = entries  # type: ignore[attr-defined]
        own = tuple(w for w in wanted if w not in heads)
        found = find_modules(self.base, entries, own)
        if heads and not own and not found:
            warnings.warn(
                f"task_type={config.task_type.value}: {type(self.base).__name__} has no module called "  # type: ignore[union-attr]
                f"{' or '.join(heads)}; its head stays frozen. Name it in modules_to_save.",
                stacklevel=4,
            )
        for path, module in found.items():
            if not isinstance(module, ModulesToSaveWrapper) or module.switch is not self.switch:
                module = ModulesToSaveWrapper(module, self.switch)
                replace_module(self.base, path, module)
            half = self._float_dtype() in (torch.float16, torch.bfloat16)
            module.add(name, torch.float32 if half and self.autocast_adapter_dtype else None)
            module.is_head = module.is_head or not clean_path(path).endswith(own)

    def _unsave_modules(self, name: str) -> None:
        for path, module in list(base_modules(self.base)):
            if isinstance(module, ModulesToSaveWrapper) and module.switch is self.switch and name in module.modules_to_save:
                del module.modules_to_save[name]
                if not module.modules_to_save:
                    replace_module(self.base, path, module.original_module)

    def _connect(self) -> None:
        """(Re)register every hook: after modules were put in or taken out."""
        self._disconnect()
        self.foreign = None
        speed_up(self)
        self.entry = Entry(self)
        self.handles = self.entry.connect()
        _HOSTS.setdefault(self.base, WeakSet()).add(self)
        for method in self.methods.values():
            self.handles += method.connect(self)
        self.checkpointing = None

    def _reconnect_others(self) -> None:
        """Modules of a shared base were put in or taken out: the other wrappers' hooks must follow."""
        for other in _HOSTS.setdefault(self.base, WeakSet()):
            if other is not self:
                other._connect()

    def _disconnect(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off the base and forget it."""
        self._known(adapter_name)
        method = self.methods.pop(adapter_name)
        method.detach(self)
        self.mixed = {m for m in self.mixed if method not in m}
        self._unsave_modules(adapter_name)
        self._connect()
        self._reconnect_others()
        if adapter_name in self.switch.active:
            rest = tuple(n for n in self.switch.active if n != adapter_name) or tuple(self.methods)[:1]
            self.switch.active = rest
            if rest:
                warnings.warn(f"Adapter {adapter_name!r} was active; active now: {', '.join(rest)}.", stacklevel=2)
            self._update_requires_grad(rest)

    def _known(self, *names: str) -> None:
        for name in names:
            if name not in self.methods:
                have = ", ".join(map(repr, self.methods)) or "none"
                hint = nearest(str(name), self.methods) + self._elsewhere(name)
                raise AdapterError(f"There is no adapter {name!r}; attached: {have}{hint}")

    def _elsewhere(self, name: str) -> str:
        """What to say of an unknown adapter that another wrapper has: an adapter belongs to its wrapper, and to its base."""
        if any(name in host.methods for host in _HOSTS.get(self.base, ())):
            return f"; {name!r} belongs to another wrapper over this base: load it into this one to use both at once"
        others = (base for base, hosts in _HOSTS.items() if any(name in host.methods for host in hosts))
        other: Any = next(others, None)
        if other is None:
            return ""
        title = getattr(other.config, "name_or_path", "") or type(other).__name__
        return f"; {name!r} is attached to another base ({title}): rows of this one cannot go through it"

    # -- switching ---------------------------------------------------------------------------------------------------
    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several together, active and (unless `inference_mode`) trainable; freeze the others.

        Raises:
            AdapterError: an unknown name, or the same name twice.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        if not isinstance(names, (list, tuple)) or len(set(map(str, names))) != len(names) or not names:
            raise AdapterError(f"set_adapter({adapter_name!r}): expected one or more different names.")
        self._known(*names)
        before, self.switch.active = self.switch.active, tuple(names)
        self._update_requires_grad({*before, *names}, frozen=inference_mode)

    def _update_requires_grad(self, names: Iterable[str] | None = None, frozen: bool = False) -> None:
        """Active adapters train, the others do not; only `names` are looked at (all), so that switching stays fast."""
        for name in self.methods if names is None else names:
            for _, parameter in self.adapter_parameters(name):
                parameter.requires_grad = name in self.switch.active and not frozen

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Freeze or unfreeze adapters without changing which are active."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self._known(name)
            for _, parameter in self.adapter_parameters(name):
                parameter.requires_grad = requires_grad

    def adapter_parameters(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """All trained parameters of an adapter (its modules to save included), under their `state_dict` names."""
        yield from self.methods[name].named_parameters(self)
        for path, module in saved_modules(self.base, self.switch, name):
            for key, parameter in module.named_parameters():
                yield f"base_model.model.{path}.modules_to_save.{name}.{key}", parameter

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Any:
        """As in torch, without the adapters of other wrappers over the same base."""
        if self.foreign is None:
            others = [host for host in _HOSTS.get(self.base, ()) if host is not self]
            self.foreign = {id(p) for host in others for name in host.methods for _, p in host.adapter_parameters(name)}
        foreign = self.foreign
        found = super().named_parameters(prefix, recurse, remove_duplicate)
        return ((name, p) for name, p in found if id(p) not in foreign)

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Run the base directly, without adapters and without gradients."""
        with torch.no_grad(), running(Plan(self.switch, ())):
            yield

    def active_now(self) -> tuple[str, ...]:
        """Adapters that apply at this moment: those of the running plan, if it is this wrapper's.

        Hooks ask this; unlike LoRA's modules they do nothing when the base is called directly.
        """
        return planned_adapters(self.switch)

    def routes_now(self) -> Routes | None:
        """The routes of the running plan, if it is this wrapper's and its batch is mixed."""
        return active_routes(self.switch)

    # -- what the entry points ask -----------------------------------------------------------------------------------
    @property
    def has_memory(self) -> bool:
        return any(type(m).memory is not Method.memory for m in self.methods.values())

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

    def owners(self, plan: Plan) -> list[tuple[Host, Group]]:
        """The compositions of adapters that take part, each with its wrapper."""
        hosts = plan.routes.hosts if plan.routes is not None else None
        return list(zip(hosts or [self] * len(plan.groups), plan.groups, strict=True))

    def fronts(self, plan: Plan, batch: int) -> tuple[Front, Front]:
        """What stands in front of each of `batch` rows: virtual tokens, and a prefix."""
        counts, prefixes = zip(*(host.counts(group) for host, group in self.owners(plan)), strict=True)
        each = None if plan.routes is None else plan.routes.each(batch, self.adapter_device)
        return Front.of(list(counts), each), Front.of(list(prefixes), each)

    def in_front(self, plan: Plan) -> list[Group]:
        """Of the adapters of each row (one entry where all rows have the same) those with virtual tokens or a prefix."""
        if not any(any(self.counts(group)) for group in plan.groups if plan.routes is None or plan.routes.hosts is None):
            return [()]
        return [tuple(n for n in group if any(self.counts((n,)))) for group in plan.by_row]

    def virtual_tokens(self, group: Group) -> Tensor | None:
        """A composition's virtual tokens, side by side [P, H]; None for none."""
        parts = [t for n in group if (t := self.methods[n].virtual_tokens(self)) is not None]
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else None

    def memory(self, group: Group) -> Memory | None:
        """A composition's prefixes, side by side: per layer (K, V) [kv_heads, K, head_dim] in the compute dtype."""
        found = [m for n in group if (m := self.methods[n].memory(self))]
        return self._side_by_side(found) if found else None

    def virtual_rows(self, plan: Plan, batch: int) -> Tensor:
        """Virtual tokens of `batch` rows [B, P, H]; a row with fewer has zeros in front of them."""
        return self._by_row(plan, batch, self.asked(plan, lambda host, group: host.virtual_tokens(group)))

    def asked(self, plan: Plan, question: Callable[[Host, Group], Any]) -> list[Any]:
        """The answers of all who take part, each under its own random numbers."""
        found = []
        for i, (host, group) in enumerate(self.owners(plan)):
            with nullcontext() if plan.routes is None else plan.routes.drawing(i):
                found.append(question(host, group))
        return found

    def memory_rows(self, plan: Plan, batch: int) -> Memory:
        """Prefixes per layer: [kv_heads, K, head_dim], or where rows differ [B, kv_heads, K, head_dim], zeros in front."""
        memories = self.asked(plan, lambda host, group: host.memory(group))
        if plan.routes is None:
            return memories[0]  # type: ignore[return-value]
        layers = range(len(next(m for m in memories if m is not None)))
        rows = [
            [self._by_row(plan, batch, [None if m is None else m[i][j] for m in memories]) for j in (0, 1)] for i in layers
        ]
        return [(keys, values) for keys, values in rows]

    @staticmethod
    def _by_row(plan: Plan, batch: int, tables: list[Tensor | None]) -> Tensor:
        """Tables [..., P_i, W], one a group (None: empty), for each of `batch` rows [B, ..., P, W], zeros in front."""
        like = next(t for t in tables if t is not None)
        if plan.routes is None:
            return like.expand(batch, *like.shape)
        most = max(t.shape[-2] for t in tables if t is not None)
        none = like.new_zeros(*like.shape[:-2], most, like.shape[-1])
        filled = [none if t is None else F.pad(t, (0, 0, most - t.shape[-2], 0)) for t in tables]
        return torch.stack(filled)[plan.routes.each(batch, like.device)]

    def has_encoder_memory(self, plan: Plan) -> bool:
        return any(getattr(self.methods[n].config, "prefix_in_encoder", False) for n in plan.adapters)

    def encoder_memory(self, plan: Plan) -> Memory | None:
        found = [m for n in plan.adapters if (m := self.methods[n].encoder_memory(self))]
        return self._side_by_side(found) if found else None

    def _side_by_side(self, memories: list) -> Memory:
        kind = self.adapter_device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self._float_dtype()
        joined = (
            memories[0]
            if len(memories) == 1
            else [
                tuple(torch.cat(parts, dim=-2) for parts in zip(*layer, strict=True))
                for layer in zip(*memories, strict=True)
            ]
        )
        return [(k.to(dtype), v.to(dtype)) for k, v in joined]


_HOSTS: WeakKeyDictionary[nn.Module, WeakSet[Host]] = WeakKeyDictionary()  # the wrappers over each base
