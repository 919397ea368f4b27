"""The wrapper: a frozen base model with adapters attached, switched, composed, merged, run and saved."""

from __future__ import annotations

import functools
import inspect
import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import checkpoint
from .architectures import backbone_embeddings
from .entry import Entry
from .errors import AdapterError, UnsupportedError, nearest
from .methods import Method, PeftConfig, method_for
from .methods.base import TASK_HEADS, replace_module
from .methods.modules_to_save import ModulesToSaveWrapper, find_modules, saved_modules
from .quantization import is_quantized, quantized_kind
from .routing import Plan, Switch, current_plan, keep_plan, running

BASE_NAME = "__base__"


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


class PeftModel(PreTrainedModel):
    """A base model with adapters.

    It is a `PreTrainedModel` by type, so that a plain `transformers.Trainer` saves and resumes adapters through
    `save_pretrained` and `load_state_dict`; everything it does not define itself is answered by the base model.

    Args:
        model: the base, a transformers model. Its parameters are frozen; they never change, except by merging.
        peft_config: configuration of the first adapter.
        adapter_name: its name.
        autocast_adapter_dtype: keep adapters of a 16-bit base in fp32.
    """

    prompt_encoder: Any
    bottleneck: Any
    adapter_biases: Any

    def __new__(cls, model: nn.Module | None = None, *args: Any, **kwargs: Any) -> PeftModel:
        if isinstance(model, PeftModel):
            raise AdapterError("This model is wrapped already. Add another adapter with model.add_adapter(name, config).")
        if not isinstance(model, nn.Module) or not hasattr(model, "config"):
            raise AdapterError(f"Expected a transformers model as the base, got {model if model is None else type(model)}.")
        return object.__new__(_wrapper_class(cls, type(model)))

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **kwargs: Any,
    ) -> None:
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
        self.train(model.training)
        freeze_base(model)
        self._attach(adapter_name, peft_config, **kwargs)
        self.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)

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
        return backbone_embeddings(self.base).weight.device

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
        return next((p.dtype for p in self.base.parameters() if p.is_floating_point()), torch.float32)

    def _get_name(self) -> str:
        """The base's class name: a plain Trainer shifts the labels of causal language models by it."""
        return self.base._get_name()

    def __repr__(self) -> str:
        return nn.Module.__repr__(self).replace(f"{self._get_name()}(", "PeftModel(", 1)

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if "_modules" not in self.__dict__ or "base_model" not in self._modules:
                raise
            return getattr(self.base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """What the base has and the wrapper has not is set on the base (`model.generation_config = …`)."""
        base = self.__dict__.get("_modules", {}).get("base_model")
        known = name in self.__dict__ or hasattr(type(self), name) or isinstance(value, (nn.Module, nn.Parameter))
        if base is not None and not known and name != "entry" and hasattr(base.model, name):
            setattr(base.model, name, value)
        else:
            super().__setattr__(name, value)

    def __reduce__(self) -> Any:
        self._disconnect()
        try:
            state = {k: v for k, v in self.__dict__.items() if k != "entry"}
            return _rebuild, (type(self.base), pickle.dumps(state))
        finally:
            self._connect()

    def __deepcopy__(self, memo: dict) -> PeftModel:
        """A copy with a base of its own, its hooks connected anew."""
        import copy

        self._disconnect()
        try:
            made = object.__new__(type(self))
            memo[id(self)] = made
            made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        finally:
            self._connect()
        made._connect()
        return made

    # -- attaching ---------------------------------------------------------------------------------------------------
    def add_adapter(
        self, adapter_name: str, peft_config: PeftConfig, low_cpu_mem_usage: bool = False, **kwargs: Any
    ) -> None:
        """Attach a new, untrained adapter. It becomes active by `set_adapter`.

        Raises:
            AdapterError: the name is taken or cannot be used.
        """
        self._attach(adapter_name, peft_config, **kwargs)
        self._update_requires_grad()

    def _attach(self, name: str, config: PeftConfig, *, for_loading: bool = False) -> None:
        if name in self.methods:
            raise AdapterError(f"There is an adapter {name!r} already. Delete it first, or choose another name.")
        reserved = not isinstance(name, str) or name == BASE_NAME or hasattr(nn.ModuleDict(), name)
        if reserved or not name or "." in name or "/" in name:
            raise AdapterError(f"{name!r} cannot name an adapter: expected a word without '.' and '/', not {BASE_NAME!r}.")
        method = method_for(config, name)
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = getattr(self.base, "name_or_path", None) or None
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
        for path, module in find_modules(self.base, entries, [w for w in wanted if w not in heads]).items():
            if not isinstance(module, ModulesToSaveWrapper) or module.switch is not self.switch:
                module = ModulesToSaveWrapper(module, self.switch)
                replace_module(self.base, path, module)
            half = self._float_dtype() in (torch.float16, torch.bfloat16)
            module.add(name, torch.float32 if half and self.autocast_adapter_dtype else None)
            module.is_head = module.is_head or not any(path == w or path.endswith(f".{w}") for w in wanted if w not in heads)

    def _unsave_modules(self, name: str) -> None:
        for path, module in list(self.base.named_modules()):
            if isinstance(module, ModulesToSaveWrapper) and module.switch is self.switch and name in module.modules_to_save:
                del module.modules_to_save[name]
                if not module.modules_to_save:
                    replace_module(self.base, path, module.original_module)

    def _connect(self) -> None:
        """(Re)register every hook: after modules were put in or taken out."""
        self._disconnect()
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
        self.methods[adapter_name].detach(self)
        del self.methods[adapter_name]
        self._unsave_modules(adapter_name)
        self._connect()
        self._reconnect_others()
        if adapter_name in self.switch.active:
            rest = tuple(n for n in self.switch.active if n != adapter_name) or tuple(self.methods)[:1]
            self.switch.active = rest
            if rest:
                warnings.warn(f"Adapter {adapter_name!r} was active; active now: {', '.join(rest)}.", stacklevel=2)
        self._update_requires_grad()

    def _known(self, *names: str) -> None:
        for name in names:
            if name not in self.methods:
                have = ", ".join(map(repr, self.methods)) or "none"
                raise AdapterError(f"There is no adapter {name!r}; attached: {have}{nearest(str(name), self.methods)}")

    # -- switching ---------------------------------------------------------------------------------------------------
    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several together, active and (unless `inference_mode`) trainable; freeze the others.

        Raises:
            AdapterError: an unknown name, or the same name twice.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._known(*names)
        if len(set(names)) != len(names) or not names:
            raise AdapterError(f"set_adapter({adapter_name!r}): expected one or more different names.")
        self.switch.active = tuple(names)
        self._update_requires_grad(frozen=inference_mode)

    def _update_requires_grad(self, frozen: bool = False) -> None:
        for name in self.methods:
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

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model is the plain base (merged adapters are taken out and put back)."""
        merged = self._merged_names()
        if merged:
            self.unmerge_adapter()
        enabled, self.switch.enabled = self.switch.enabled, False
        try:
            yield
        finally:
            self.switch.enabled = enabled
            if merged:
                self.merge_adapter(merged)

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Run the base directly, without adapters and without gradients."""
        with torch.no_grad(), running(Plan(self.switch, ())):
            yield

    def active_now(self) -> tuple[str, ...]:
        """Adapters that apply at this moment: those of the running plan, if it is this wrapper's.

        Hooks ask this; unlike LoRA's modules they do nothing when the base is called directly.
        """
        plan = current_plan()
        return plan.adapters if plan is not None and plan.switch is self.switch else ()

    # -- what the entry points ask -----------------------------------------------------------------------------------
    @property
    def has_memory(self) -> bool:
        return any(type(m).memory is not Method.memory for m in self.methods.values())

    def counts(self, plan: Plan) -> tuple[int, int]:
        """Number of virtual tokens and of prefix entries under a plan."""
        count = prefix = 0
        for name in plan.adapters:
            method = self.methods[name]
            if type(method).memory is not Method.memory:
                prefix += method.config.num_virtual_tokens  # type: ignore[attr-defined]
            elif type(method).virtual_tokens is not Method.virtual_tokens:
                count += method.config.num_virtual_tokens  # type: ignore[attr-defined]
        return count, prefix

    def virtual_tokens(self, plan: Plan) -> Tensor:
        """The active adapters' virtual tokens, side by side [P, H]."""
        parts = [t for n in plan.adapters if (t := self.methods[n].virtual_tokens(self)) is not None]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def memory(self, plan: Plan) -> list[tuple[Tensor, Tensor]]:
        """The active adapters' prefixes, side by side: per layer (K, V) [kv_heads, K, head_dim] in the compute dtype."""
        return self._side_by_side([m for n in plan.adapters if (m := self.methods[n].memory(self))])

    def has_encoder_memory(self, plan: Plan) -> bool:
        return any(getattr(self.methods[n].config, "prefix_in_encoder", False) for n in plan.adapters)

    def encoder_memory(self, plan: Plan) -> list[tuple[Tensor, Tensor]] | None:
        found = [m for n in plan.adapters if (m := self.methods[n].encoder_memory(self))]
        return self._side_by_side(found) if found else None

    def _side_by_side(self, memories: list) -> list[tuple[Tensor, Tensor]]:
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

    # -- running -----------------------------------------------------------------------------------------------------
    def _plan(self, adapter_names: Iterable[str] | None = None) -> Plan:
        if adapter_names is None:
            return Plan(self.switch, self.switch.active if self.switch.enabled else ())
        names = list(adapter_names)
        self._known(*(n for n in names if n != BASE_NAME))
        if len(set(names)) > 1:
            raise UnsupportedError(
                f"adapter_names names different adapters in one batch ({', '.join(sorted(set(names)))}); "
                "this version runs one adapter (or one composition) a batch. Split the batch by adapter."
            )
        return Plan(self.switch, tuple(n for n in names[:1] if n != BASE_NAME))

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        with running(self._plan(kwargs.pop("adapter_names", None))):
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of the base model in evaluation mode, with the active adapters. Takes all that it takes."""
        trained = [m for m in self.modules() if m.training]
        self.eval()  # in training mode activation checkpointing would throw the cache away, and dropout would apply
        try:
            with running(self._plan(kwargs.pop("adapter_names", None))):
                return self.base.generate(*args, **kwargs)
        finally:
            for module in trained:
                module.training = True

    def protect_checkpointing(self) -> None:
        """Let activation checkpointing recompute under the plan of its forward pass."""
        if self.checkpointing is None:
            self.checkpointing = [m for m in self.base.modules() if hasattr(m, "gradient_checkpointing")]
        module: Any
        for module in self.checkpointing:
            function = getattr(module, "_gradient_checkpointing_func", None)
            if not (module.gradient_checkpointing and function is not None):
                continue
            if self.has_memory and getattr(function, "keywords", {}).get("use_reentrant"):
                raise UnsupportedError(
                    "Prefix Tuning needs non-reentrant activation checkpointing: "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}."
                )
            module._gradient_checkpointing_func = keep_plan(function)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs: Any) -> None:
        """Switch activation checkpointing on in the base."""
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            self.base.enable_input_require_grads()
        self.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **kwargs: Any) -> None:
        """The same under transformers' newer name."""
        if (activation_checkpointing_kwargs or {}).get("use_reentrant"):
            self.base.enable_input_require_grads()
        self.base.activation_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)

    # -- counting ----------------------------------------------------------------------------------------------------
    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Trainable and all parameters, in elements (packed 4-bit weights count twice their bytes)."""
        trainable = total = 0
        for parameter in self.parameters():
            count = parameter.numel()
            if type(parameter).__name__ == "Params4bit":
                count *= 2 * getattr(parameter, "quant_storage", torch.uint8).itemsize
            total += count
            trainable += count if parameter.requires_grad else 0
        return trainable, total

    def print_trainable_parameters(self) -> None:
        """One line: trainable, all, and the share of them."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}")

    # -- merging -----------------------------------------------------------------------------------------------------
    def _merged_names(self) -> list[str]:
        names: dict[str, None] = {}
        for module in self.base.modules():
            if getattr(module, "switch", None) is self.switch:
                names.update(dict.fromkeys(getattr(module, "merged_adapters", ())))
        return list(names)

    def merge_adapter(self, adapter_names: str | list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters (the active ones) into the base weights, reversibly: the model computes the same, faster.

        Raises:
            UnsupportedError: a method without merge (soft prompts, bottleneck adapters), or a quantised base.
        """
        self._merge(adapter_names, safe=safe_merge, keep=True)

    def _merge(self, adapter_names: str | list[str] | None, *, safe: bool, keep: bool) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names or self.switch.active)
        self._known(*names)
        self._check_mergeable(names)
        for method in {type(self.methods[n]): self.methods[n] for n in names}.values():
            method.merge(self, names, safe=safe, keep=keep)  # type: ignore[attr-defined]

    def _check_mergeable(self, names: list[str]) -> None:
        for name in names:
            if not self.methods[name].mergeable:
                kind = self.methods[name].config.peft_type
                raise UnsupportedError(
                    f"Adapter {name!r} is {getattr(kind, 'value', kind)}: it is no change of weights, so it cannot be "
                    "merged. Keep it attached."
                )
        if is_quantized(self.base):
            raise UnsupportedError("The base is quantised: load it unquantised, attach the adapter and merge there.")

    def unmerge_adapter(self) -> None:
        """Undo `merge_adapter`; the base weights come back bit for bit."""
        for module in self.base.modules():
            if getattr(module, "switch", None) is self.switch and getattr(module, "merged_adapters", None):
                module.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The base with the adapters folded in for good and nothing of GraftLM left; it saves as plain transformers."""
        from .merging import merge_and_unload

        return merge_and_unload(self, safe_merge, adapter_names)

    def unload(self) -> nn.Module:
        """The base as it was, without any adapter."""
        self.unmerge_adapter()
        for name in list(self.methods):
            self.methods[name].detach(self)
            self._unsave_modules(name)
        self.methods.clear()
        self.switch.active = ()
        self._forget()
        return self.base

    def _forget(self) -> None:
        """Take this wrapper's hooks off the base; others over the same base find their places again."""
        self._disconnect()
        _HOSTS.get(self.base, WeakSet()).discard(self)
        self._reconnect_others()

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str, **options: Any) -> None:
        """A new LoRA adapter out of several; see `graftlm.merging.add_weighted_adapter`."""
        from .merging import add_weighted_adapter

        add_weighted_adapter(self, adapters, weights, adapter_name, **options)

    def get_layer_status(self) -> list[Any]:
        """One entry an adapted place: what is attached, active, merged and trainable there."""
        from .merging import layer_status

        return layer_status(self)

    def get_model_status(self) -> Any:
        """The same for the model as a whole."""
        from .merging import model_status

        return model_status(self)

    # -- files -------------------------------------------------------------------------------------------------------
    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Write every adapter (or `selected_adapters`) as HF PEFT does; see `graftlm.checkpoint.save`."""
        checkpoint.save(self, save_directory, *args, **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ) -> PeftModel:
        """Attach a saved adapter to a base model; see `graftlm.checkpoint.load` for the keyword arguments.

        Raises:
            CheckpointError: files that are missing, broken, or do not fit the model (every key is listed).
            BaseMismatchError: the adapter was trained on another base.
        """
        options = checkpoint.load_options(kwargs)
        config = checkpoint.config_for(model_id, config, is_trainable, options.hub)
        wrapper = cls.__new__(cls, model)
        wrapper.__init__(model, config, adapter_name, autocast_adapter_dtype, for_loading=True)  # type: ignore[misc]
        try:
            checkpoint.fill(wrapper, model_id, adapter_name, options)
        except Exception:
            wrapper.unload()
            raise
        wrapper.set_adapter(adapter_name, inference_mode=not is_trainable)
        return wrapper if is_trainable else wrapper.eval()

    def load_adapter(self, model_id: str | os.PathLike, adapter_name: str, is_trainable: bool = False, **kwargs: Any) -> Any:
        """Attach a further saved adapter, or read a saved state into one that is attached under this name.

        It does not become active (but the active one stays so). Errors as in `from_pretrained`; after an error the model
        is as it was.
        """
        options = checkpoint.load_options(kwargs)
        fresh = adapter_name not in self.methods
        if fresh:
            config = checkpoint.config_for(model_id, None, is_trainable, options.hub)
            self._attach(adapter_name, config, for_loading=True)
        try:
            checkpoint.fill(self, model_id, adapter_name, options)
        except Exception:
            if fresh:
                self.delete_adapter(adapter_name)
            raise
        self.set_requires_grad(adapter_name, is_trainable)
        if not is_trainable:
            self.eval()
        return checkpoint.nothing_missing()

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As in torch; a state that holds adapters only (a Trainer's checkpoint) is read into them."""
        return checkpoint.load_state(self, state_dict, functools.partial(nn.Module.load_state_dict, self), strict, assign)

    push_to_hub = PreTrainedModel.push_to_hub

    def create_or_update_model_card(self, output_dir: str | os.PathLike) -> None:
        """Write README.md beside the weights."""
        checkpoint.write_card(self, self.active_adapter, output_dir)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """A soft prompt's table as it is kept in its file."""
        return self.methods[adapter_name].tensors(self)["prompt_embeddings"].cpu()


def freeze_base(model: nn.Module) -> None:
    """Freeze the base's own parameters; adapters of another wrapper over it are left alone."""
    for name, parameter in model.named_parameters():
        if ".lora_" not in name and ".modules_to_save." not in name:
            parameter.requires_grad = False


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Freeze a transformers model and attach a new adapter.

    `mixed` is accepted: adapters of different methods always compose here.
    """
    if revision is not None:
        peft_config.revision = revision
    return PeftModel(model, peft_config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)


_HOSTS: WeakKeyDictionary[nn.Module, WeakSet[PeftModel]] = WeakKeyDictionary()  # the wrappers over each base
_CLASSES: dict[tuple[Any, Any], Any] = {}


def _wrapper_class(cls: Any, base: Any) -> Any:
    """`PeftModel` with the base's own forward signature, which a Trainer reads to keep a data set's columns."""
    if (cls, base) in _CLASSES:
        return _CLASSES[cls, base]
    signature = inspect.signature(base.forward)
    names = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    rest = [p for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    mixed = inspect.Parameter("adapter_names", inspect.Parameter.KEYWORD_ONLY, default=None)

    def forward(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward with the active adapters; `adapter_names` chooses others for this call."""
        return self._run(*args, **kwargs)

    forward.__signature__ = signature.replace(parameters=[*names, mixed, *rest])  # type: ignore[attr-defined]
    made = type("PeftModel", (cls,), {"forward": forward, "__module__": __name__, "__doc__": cls.__doc__})
    return _CLASSES.setdefault((cls, base), made)


def _rebuild(base: type, state: bytes) -> PeftModel:
    """A wrapper out of its pickle."""
    made = object.__new__(_wrapper_class(PeftModel, base))
    made.__dict__.update(pickle.loads(state))
    made._connect()
    return made


def _answered_by_base(name: str) -> property:
    def get(self: PeftModel) -> Any:
        return getattr(self.base, name)

    def put(self: PeftModel, value: Any) -> None:
        setattr(self.base, name, value)

    return property(get, put)


def _delegate() -> None:
    """Everything that `PreTrainedModel` would answer by itself is asked of the base instead."""
    own: Callable[[str], bool] = lambda n: n in PeftModel.__dict__ or hasattr(nn.Module, n) or hasattr(object, n)  # noqa: E731
    for name in dir(PreTrainedModel):
        if not own(name) and not (name.startswith("__") and name.endswith("__")):
            setattr(PeftModel, name, _answered_by_base(name))


_delegate()
