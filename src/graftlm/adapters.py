"""What adapters hang on: the base model, its adapters by name, which are switched on, and what the entry points ask.

Methods and entry points talk to this part (they call it the *host*) and know no other; `model.PeftModel` adds what users
call, in HF PEFT's words.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from .architectures import base_modules, clean_path
from .architectures.fast import slow_down, speed_up
from .attached import _SETS, Attached
from .bundled import known_as
from .checkpointing import checkpointed_modules, enable_checkpointing, keep_passes
from .errors import AdapterError, UnsupportedError, nearest
from .layers import AdaptedParameter, adapted_layers, save_modules, saved_modules, unfuse, unsave_modules
from .methods import Method, PeftConfig, method_for
from .methods.base import TASK_HEADS
from .preparation import freeze_base
from .quantization import settle
from .routing import BASE_NAME, remember, watch


class AdapterSet(Attached):
    """A frozen base model and its adapters, which come, go, and are switched.

    Args:
        model: the base. Its parameters are frozen; they never change, except by merging.
        autocast_adapter_dtype: keep adapters of a 16-bit base in fp32.
    """

    def __init__(self, model: nn.Module, autocast_adapter_dtype: bool = True) -> None:
        super().__init__(model, autocast_adapter_dtype)
        self.card_metrics: dict[str, Any] = {}
        self.handles: dict[str | None, list[Any]] = {}  # hooks by adapter; those of the entry points under None
        self.layout: Any = None  # what the hooks were placed on
        self.checkpointing: list[nn.Module] | None = None
        self.active_before: tuple[tuple[str, ...], tuple[str, ...]] | None = None  # what merging made active in its place
        self.foreign: set[int] | None = None  # other wrappers' parameters, until adapters come or go
        self.lean = self.packs = True
        self.mixes: set[str] = set()  # kinds of adapters that were tried out in a mixed batch
        self.mixed: set[tuple[Method, ...]] = set()  # and compositions of such kinds
        self.train(model.training)
        freeze_base(model)
        settle(model)

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
        if self.plain and (config.is_prompt_learning or config.is_adaption_prompt):
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise UnsupportedError(
                f"{kind} on {type(self.base).__name__}: virtual tokens and prefixes enter a transformers model by its "
                "configuration (hidden size, layers, positions), and this module has none. Use a method that changes "
                "layers, such as LoRA."
            )
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = known_as(getattr(self.base, "name_or_path", None) or None)
        try:
            half = self._float_dtype() in (torch.float16, torch.bfloat16)
            dtype = torch.float32 if half and self.autocast_adapter_dtype else None
            heads = TASK_HEADS.get(config.task_type, ())  # type: ignore[call-overload]
            if for_loading and "modules_to_save" in config.own_fields and not config.modules_to_save:  # type: ignore[attr-defined]
                heads = ()  # a file of HF PEFT's, whose configuration of this method has none
            save_modules(self.base, self.switch, name, config, dtype, heads)
            method.attach(self, for_loading=for_loading)
        except Exception:
            unsave_modules(self.base, self.switch, name)
            raise
        self.methods[name] = method
        self._connect(method)
        self._reconnect_others()

    def _connect(self, fresh: Method | None = None) -> None:
        """Place the hooks: all of them where modules of the base were put in or taken out since, else those of `fresh`, a
        new adapter. What was tried out on the base outlasts both."""
        self.foreign = None
        layout = [m for _, m in base_modules(self.base)], self.has_memory
        if layout == self.layout:
            if fresh is not None:
                for module in self._modules_of(fresh) if not self.plain else ():
                    speed_up(module)
                self.handles[fresh.name] = fresh.connect(self)
            return
        self._disconnect()
        self.layout = layout
        if not self.plain:
            speed_up(self)
        self.handles[None] = [*unfuse(self.base), *self._enter()]
        _SETS.setdefault(self.base, WeakSet()).add(self)
        for name, method in self.methods.items():
            self.handles[name] = method.connect(self)
        self.checkpointing = None

    def _enter(self) -> list[Any]:
        """Register the hooks of what runs passes over the base; returns their handles. Here passes are those of the base."""
        return []

    def _modules_of(self, method: Method) -> Iterator[nn.Module]:
        """Modules that hold an adapter's parameters, and what else stands in containers of its own."""
        for container in (self.prompt_encoder, self.bottleneck):
            if method.name in container:
                yield container[method.name]
        for path in dict.fromkeys(key.rpartition(".")[0] for key, _ in method.named_parameters(self)):
            yield self.get_submodule(path)
        if getattr(method.config, "modules_to_save", None) or method.saves:
            yield from (module for _, module in saved_modules(self.base, self.switch, method.name))

    def _reconnect_others(self) -> None:
        """Modules of a shared base may have been put in or taken out: the other wrappers' hooks must follow."""
        for other in _SETS.setdefault(self.base, WeakSet()):
            if other is not self:
                other._connect()

    def protect_checkpointing(self, keep: Callable[[Callable], Callable]) -> None:
        """Let activation checkpointing recompute as in its forward pass (see `keep_passes`)."""
        if self.checkpointing is None:
            self.checkpointing = checkpointed_modules(self.base)
        keep_passes(self.checkpointing, self.has_memory, keep)

    def remember_pass(self) -> None:
        """Note what acts in the pass that begins, if it has gradients, in the base's wrappers: see `routing.remember`."""
        if torch.is_grad_enabled():
            for host in _SETS.get(self.base, ()):
                remember(host.switch)

    def watch_pass(self, *outputs: Any) -> None:
        """Note it where the backward pass comes to the pass that has just ended: see `routing.watch`."""
        if torch.is_grad_enabled():
            watch([host.switch for host in _SETS.get(self.base, ())], outputs)

    def _disconnect(self, *names: str) -> None:
        """Take the hooks (of some adapters) off."""
        for name in names or list(self.handles):
            for handle in self.handles.pop(name, ()):
                handle.remove()
        self.layout = self.layout if names else None

    def _forget(self) -> None:
        """Take this wrapper's hooks off the base; others over the same base find their places again."""
        self._disconnect()
        _SETS.get(self.base, WeakSet()).discard(self)
        self._reconnect_others()
        if not _SETS.get(self.base):
            slow_down(self.base)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off the base and forget it.

        Raises:
            AdapterError: it is merged.
        """
        self._known(adapter_name)
        if any(adapter_name in layer.merged_adapters for _, layer in adapted_layers(self.base, self.switch)):
            raise AdapterError(
                f"Adapter {adapter_name!r} is merged into the base; call unmerge_adapter() before deleting it."
            )
        method = self.methods.pop(adapter_name)
        self.configs.pop(adapter_name, None)
        method.detach(self)
        self._disconnect(*([] if self.handles.get(adapter_name) else [adapter_name]))  # others may share its hooks
        self.mixed = {m for m in self.mixed if method not in m}
        unsave_modules(self.base, self.switch, adapter_name)
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
        if any(name in host.methods for host in _SETS.get(self.base, ())):
            return f"; {name!r} belongs to another wrapper over this base: load it into this one to use both at once"
        others = (base for base, hosts in _SETS.items() if any(name in host.methods for host in hosts))
        other: Any = next(others, None)
        if other is None:
            return ""
        title = getattr(getattr(other, "config", None), "name_or_path", "") or type(other).__name__
        return f"; {name!r} is attached to another base ({title}): rows of this one cannot go through it"

    # -- switching ---------------------------------------------------------------------------------------------------
    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several together, active and (unless `inference_mode`) trainable; freeze the others.

        Raises:
            AdapterError: an unknown name, or the same name twice.
            CompositionError: adapters that cannot be active together.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        if not isinstance(names, (list, tuple)) or len(set(map(str, names))) != len(names) or not names:
            raise AdapterError(f"set_adapter({adapter_name!r}): expected one or more different names.")
        self._known(*names)
        self._refuse_together(names)
        before, self.switch.active = self.switch.active, tuple(names)
        self._update_requires_grad({*before, *names}, frozen=inference_mode)

    def _refuse_together(self, names: Iterable[str]) -> None:
        """CompositionError for adapters that cannot be active together."""
        for one, other in itertools.combinations(names, 2):
            self.methods[one].refuse_beside(self, self.methods[other])

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

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model is the plain base, whatever is active or merged."""
        enabled, self.switch.enabled = self.switch.enabled, False
        try:
            yield
        finally:
            self.switch.enabled = enabled

    def enable_adapter_layers(self) -> None:
        """Let the active adapters act again."""
        self.switch.enabled = True

    def disable_adapter_layers(self) -> None:
        """Run the plain base from here on, until `enable_adapter_layers`."""
        self.switch.enabled = False

    def prepare_model_for_gradient_checkpointing(self, model: Any = None) -> None:
        """Let the embeddings' outputs require gradients, which reentrant checkpointing needs."""
        self.base.enable_input_require_grads()

    # -- what HF PEFT says of them -------------------------------------------------------------------------------------
    @property
    def targeted_module_names(self) -> list[str]:
        """The modules of the base that adapters change, by their names in it."""
        return [clean_path(path) for path, _ in adapted_layers(self.base, self.switch)]

    @property
    def targeted_parameter_names(self) -> list[str]:
        """The parameters of the base that adapters change by `target_parameters`."""
        found = adapted_layers(self.base, self.switch)
        return [f"{clean_path(p)}.{m.parameter_name}" for p, m in found if isinstance(m, AdaptedParameter)]

    @property
    def prefix(self) -> str:
        """How the names of the active method's tensors start: "lora_"."""
        changes = [layer.changes.get(self.active_adapter) for _, layer in adapted_layers(self.base, self.switch)]
        found = [change.tables[0].partition("_")[0] for change in changes if change is not None and change.tables]
        if not found:
            raise AttributeError(f"{type(self.methods[self.active_adapter].config).__name__} changes no layer.")
        return (
            f"{next((start for start in found if start != 'trainable'), 'trainable_tokens')}_"  # LoRA may train tokens too
        )

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Any:
        """As in torch, without the adapters of other wrappers over the same base."""
        if self.foreign is None:
            others = [host for host in _SETS.get(self.base, ()) if host is not self]
            self.foreign = {id(p) for host in others for name in host.methods for _, p in host.adapter_parameters(name)}
        foreign = self.foreign
        found = super().named_parameters(prefix, recurse, remove_duplicate)
        return ((name, p) for name, p in found if id(p) not in foreign)

    @property
    def penalised(self) -> bool:
        """Whether training adds something to the active adapters' loss."""
        return any(self.methods[name].penalised for name in self.switch.active)

    def penalty(self, names: Iterable[str]) -> Tensor | None:
        """What adapters that are trained add to the loss of a training pass; None for nothing."""
        found = None
        for name in names:
            method = self.methods[name]
            if method.penalised and any(p.requires_grad for _, p in method.named_parameters(self)):
                own = method.penalty(self)
                found = own if found is None else found + own
        return found

    def update_and_allocate(self, global_step: int) -> None:
        """AdaLoRA's ranks of the active adapters, after a step of the optimizer (counted from 0) and before its gradients
        are set to zero. `graftlm.Trainer` calls it by itself, `RankSchedule` in other Trainers.

        Raises:
            AdapterError: no active adapter has such a schedule.
        """
        active = [self.methods[name] for name in self.switch.active]
        own = [method for method in active if method.scheduled]
        if not own:
            raise AdapterError(
                f"update_and_allocate: none of {', '.join(self.switch.active)} is AdaLoRA. Leave the call out."
            )
        for method in own:
            method.after_step(self, global_step)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Trainable and all parameters, in elements (packed 4-bit weights count twice their bytes)."""
        trainable = total = 0
        for parameter in self.parameters():
            count = getattr(parameter, "ds_numel", parameter.numel())  # of what DeepSpeed has in parts
            if type(parameter).__name__ == "Params4bit":
                count *= 2 * getattr(parameter, "quant_storage", torch.uint8).itemsize
            total += count
            trainable += count if parameter.requires_grad else 0
        return trainable, total

    def print_trainable_parameters(self) -> None:
        """One line: trainable, all, and the share of them."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}")

    # -- activation checkpointing -----------------------------------------------------------------------------------------
    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs: Any) -> None:
        """Switch activation checkpointing on in the base.

        Args:
            gradient_checkpointing_kwargs: for `torch.utils.checkpoint`, and `every_n_layers` (only each n-th layer is
                computed again; the others keep their activations), so that it can stand in `TrainingArguments`.
        """
        enable_checkpointing(self.base, "gradient", gradient_checkpointing_kwargs, kwargs)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **kwargs: Any) -> None:
        """The same under transformers' newer name."""
        enable_checkpointing(self.base, "activation", activation_checkpointing_kwargs, kwargs)
