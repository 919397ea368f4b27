"""The wrapper: a frozen base model with adapters attached, switched, composed, merged, run and saved."""

from __future__ import annotations

import functools
import inspect
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from . import checkpoint
from .architectures import base_modules
from .architectures.fast import slow_down
from .entry import batch_size
from .errors import AdapterError, ConfigError, UnsupportedError
from .host import _HOSTS, Host
from .methods import PeftConfig
from .mixing import AdapterNames, mixed_plan
from .quantization import settle
from .routing import Plan, keep_plan, running


class PeftModel(Host):
    """A base model with adapters.

    It is a `PreTrainedModel` by type, so that a plain `transformers.Trainer` saves and resumes adapters through
    `save_pretrained` and `load_state_dict`; everything it does not define itself is answered by the base model.

    Args:
        model: the base, a transformers model. Its parameters are frozen; they never change, except by merging.
        peft_config: configuration of the first adapter.
        adapter_name: its name.
        autocast_adapter_dtype: keep adapters of a 16-bit base in fp32.
    """

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
        super().__init__(model, autocast_adapter_dtype)
        self._attach(adapter_name, peft_config, **kwargs)
        self.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)

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

    # -- running -----------------------------------------------------------------------------------------------------
    def _plan(self, adapter_names: AdapterNames | None = None, batch: int | None = None) -> Plan:
        """The plan of a call of `batch` rows; see `mixing` for `adapter_names`."""
        if adapter_names is None:
            return Plan(self.switch, self.switch.active if self.switch.enabled else ())
        return mixed_plan(self, adapter_names, batch)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse_half_on_cpu()
        if self.entry.engine.stale():
            self._connect()
        names = kwargs.pop("adapter_names", None)
        smoothing = kwargs.pop("label_smoothing", None) or 0.0
        if not 0 <= smoothing < 1:
            raise ConfigError(f"label_smoothing={smoothing}: expected a share of at least 0 and below 1.")
        plan = self._plan(names, None if names is None else batch_size(self.entry.named(args, kwargs)))
        plan.smoothing = smoothing
        with running(plan):
            try:
                return self.base_model(*args, **kwargs)
            finally:
                self.entry.engine.leave(plan)

    def can_pack(self) -> bool:
        """Whether training rows may hold several sequences (`position_ids` that start again) under the active adapters.

        It is tried out once, on a small random batch.
        """
        form = self._training_form() if self.packs else None
        return form is not None and form.packs

    def makes_loss(self, inputs: dict[str, Any] | None = None) -> bool:
        """Whether training passes, or that of these `inputs`, make the loss without all logits under the active adapters;
        only then does a call take `label_smoothing`, the share of each target that is spread over the vocabulary.

        It is tried out once, on a small random batch.
        """
        if inputs is not None:
            inputs = {k: v for k, v in inputs.items() if k not in ("adapter_names", "label_smoothing")}
            if self.entry.engine.way(self._plan(), inputs) == "plain":
                return False
        return self._training_form() is not None

    def _training_form(self) -> Any:
        """The short cuts of training passes; None for none."""
        if self.entry.engine.stale():
            self._connect()
        engine = self.entry.engine
        asked = any(engine.asked({}, k) for k in ("output_attentions", "output_hidden_states", "output_router_logits"))
        return engine.form(self._plan()) if self.lean and engine.head is not None and not asked else None

    def heeds_items(self) -> bool:
        """Whether the base's training loss is divided by `num_items_in_batch`; tried once."""
        return self.entry.engine.heeds_items(self._plan())

    def _refuse_half_on_cpu(self) -> None:
        """UnsupportedError for training in float16 on a CPU, where no gradient scaler keeps small gradients alive."""
        if not (self.training and torch.is_grad_enabled() and self.adapter_device.type == "cpu"):
            return
        if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.float16:
            raise UnsupportedError(
                "fp16 training on a CPU: there is no gradient scaling, small gradients become zero. Use bf16=True instead "
                "of fp16=True in TrainingArguments (torch.autocast('cpu', torch.bfloat16) in a loop of your own)."
            )
        if self._float_dtype() is torch.float16:
            raise UnsupportedError(
                "The base is in float16, which cannot be trained on a CPU (no gradient scaling). Load it with "
                "dtype=torch.bfloat16 (or float32); a quantised base can also go through "
                "graftlm.prepare_model_for_kbit_training."
            )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of the base model in evaluation mode, with the active adapters. Takes all that it takes, and
        `adapter_names`, one a row (see `mixing`)."""
        trained = [m for m in self.modules() if m.training]
        self.eval()  # in training mode activation checkpointing would throw the cache away, and dropout would apply
        try:
            names = kwargs.pop("adapter_names", None)
            given = args[0] if args and isinstance(args[0], Tensor) else kwargs.get("inputs")
            self._refuse_chunks(kwargs)
            rows = None if names is None else batch_size(kwargs | {"input_ids": kwargs.get("input_ids", given)})
            plan = self._plan(names, rows)
            self._resume(plan, kwargs | ({} if given is None else {"input_ids": given}))
            with running(plan):
                return self.base.generate(*args, **kwargs)
        finally:
            for module in trained:
                module.training = True

    def _resume(self, plan: Plan, options: dict[str, Any]) -> None:
        """Check what a `generate` goes on from: a cache with virtual tokens or a prefix in it, outputs of the encoder."""
        cache, mask, encoded = (options.get(n) for n in ("past_key_values", "attention_mask", "encoder_outputs"))
        count = self.fronts(plan, batch_size(options))[0]
        if encoded is not None and count:  # a mask of ones alone does not come to the model
            self.entry.check_encoded(encoded, mask, count)
            plan.encoded = True
        if not isinstance(cache, Cache) or not cache.get_seq_length() or not any(self.in_front(plan)):
            return
        if self.entry.encoder_decoder:
            raise UnsupportedError(
                "generate does not go on from past_key_values with a prefix in the decoder; leave past_key_values out."
            )
        names = ("input_ids", "inputs_embeds", "position_ids", "token_type_ids")
        whole = {n: options[n] for n in names if isinstance(options.get(n), Tensor)}
        given = whole["inputs_embeds"] if "inputs_embeds" in whole else whole.get("input_ids")
        if "inputs_embeds" in whole:
            whole.pop("input_ids", None)
        if given is not None and (mask is None or mask.shape == given.shape[:2]):  # else they are the new ones alone
            plan.resumed = whole

    def _refuse_chunks(self, options: dict[str, Any]) -> None:
        """UnsupportedError for a prefill in chunks, whose first one may hold only padding, with virtual tokens."""
        config = options.get("generation_config") or getattr(self.base, "generation_config", None)
        chunks = options.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None)
        if chunks and any(self.counts((name,))[0] for name in self.methods):
            raise UnsupportedError("prefill_chunk_size does not go with virtual tokens: leave it out.")

    def protect_checkpointing(self) -> None:
        """Let activation checkpointing recompute under the plan of its forward pass."""
        if self.checkpointing is None:
            self.checkpointing = [m for _, m in base_modules(self.base) if hasattr(m, "gradient_checkpointing")]
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
        """Switch activation checkpointing on in the base.

        Args:
            gradient_checkpointing_kwargs: for `torch.utils.checkpoint`, and `every_n_layers` (only each n-th layer is
                computed again; the others keep their activations), so that it can stand in `TrainingArguments`.
        """
        self._enable_checkpointing(self.base.gradient_checkpointing_enable, gradient_checkpointing_kwargs, kwargs)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **kwargs: Any) -> None:
        """The same under transformers' newer name."""
        self._enable_checkpointing(self.base.activation_checkpointing_enable, activation_checkpointing_kwargs, kwargs)

    def _enable_checkpointing(self, enable: Callable, given: dict | None, others: dict[str, Any]) -> None:
        options = dict(given or {})
        if "every_n_layers" in options:
            others = others | {"every_n_layers": options.pop("every_n_layers")}
        if options.get("use_reentrant"):
            self.base.enable_input_require_grads()
        try:
            enable(options or None, **others)
        except TypeError as error:
            if "every_n_layers" not in others:
                raise
            raise UnsupportedError(
                f"every_n_layers={others['every_n_layers']}: this version of transformers, or this model, recomputes every "
                f"layer or none ({error}). Leave it out."
            ) from error

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
    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model is the plain base, whatever is active or merged."""
        enabled, self.switch.enabled = self.switch.enabled, False
        try:
            yield
        finally:
            self.switch.enabled = enabled

    def _merged_layers(self) -> list[Any]:
        own = [m for _, m in base_modules(self.base) if getattr(m, "switch", None) is self.switch]
        return [m for m in own if getattr(m, "merged_adapters", None)]

    def _follow(self, changed: Any = True) -> None:
        """Layers were replaced by a merge or its undoing: the hooks that stood on them follow."""
        if changed:
            self._connect()
            self._reconnect_others()

    def merge_adapter(
        self, adapter_names: str | list[str] | None = None, safe_merge: bool = False, requantize: bool = False
    ) -> None:
        """Fold adapters (the active ones) into the base weights, reversibly: the model computes the same, faster.

        Which adapters act is said by `set_adapter` as before: passes that others go through, that go through none, or that
        train, are computed by the weights as they were. Where `adapter_names` has the active ones and more, all of them
        become active.

        A quantised layer becomes a bf16 copy, or with `requantize` a layer of its own kind again; by how much the logits
        move is printed.

        Raises:
            UnsupportedError: a method without merge (soft prompts, bottleneck adapters).
            AdapterError: some of the names are not active and other adapters are.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names or self.switch.active)
        self._known(*names)
        active = self.switch.active
        if not set(names) <= set(active) and not set(active) <= set(names):
            raise AdapterError(
                f"merge_adapter({names}) while {', '.join(active)} is active: merged or not, the active adapters are those "
                f"that act. Call set_adapter({names}) first (or name all that are to act)."
            )
        self.switch.active = active if set(names) <= set(active) else tuple(dict.fromkeys(names))
        try:
            self._merge(names, safe=safe_merge, keep=True, requantize=requantize)
        except Exception:
            self.switch.active = active
            raise

    def _merge(self, names: list[str], *, safe: bool, keep: bool, requantize: bool) -> None:
        from .merging import drift_printed, merge

        self._check_mergeable(names)
        with drift_printed(self, names, requantize):
            merge(self, names, safe=safe, keep=keep, requantize=requantize)
            self._follow()

    def _check_mergeable(self, names: list[str]) -> None:
        for name in names:
            if not self.methods[name].mergeable:
                kind = self.methods[name].config.peft_type
                raise UnsupportedError(
                    f"Adapter {name!r} is {getattr(kind, 'value', kind)}: it is no change of weights, so it cannot be "
                    "merged. Keep it attached."
                )

    def unmerge_adapter(self) -> None:
        """Undo `merge_adapter`; the base weights come back bit for bit."""
        self._unmerge()

    def _unmerge(self, *names: str) -> None:
        """Take adapters (all) out of the base weights; what else is merged stays so."""
        changed = False
        for layer in self._merged_layers():
            for name in [n for n in names if n in layer.merged_adapters] if names else [None]:
                layer.unmerge(name)
                changed = True
        self._follow(changed)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        requantize: bool = False,
    ) -> nn.Module:
        """The base with the adapters folded in for good; it saves as plain transformers. As `merge_adapter` otherwise."""
        from .merging import merge_and_unload

        return merge_and_unload(self, safe_merge, adapter_names, requantize)

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
        if not _HOSTS.get(self.base):
            slow_down(self.base)

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

    def load_adapter(
        self,
        model_id: str | os.PathLike,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Attach a further saved adapter, or read a saved state into one that is attached under this name.

        It does not become active (but the active one stays so). Errors as in `from_pretrained`; after an error the model
        is as it was. `autocast_adapter_dtype` is the wrapper's own where it is None; `torch_device` (HF PEFT's) has no
        meaning here: tensors go where the base is.
        """
        with self.casting(autocast_adapter_dtype):
            return self._load_adapter(model_id, adapter_name, is_trainable, kwargs)

    def _load_adapter(self, model_id: str | os.PathLike, adapter_name: str, is_trainable: bool, kwargs: dict) -> Any:
        options = checkpoint.load_options(kwargs)
        fresh = adapter_name not in self.methods
        if fresh:
            config = checkpoint.config_for(model_id, None, is_trainable, options.hub)
            self._attach(adapter_name, config, for_loading=True)
        else:
            checkpoint.check_same(self.peft_config[adapter_name], model_id, adapter_name, options.hub)
        try:
            checkpoint.fill(self, model_id, adapter_name, options)
        except Exception:
            if fresh:
                self.delete_adapter(adapter_name)
            raise
        self.set_requires_grad(adapter_name, is_trainable and adapter_name in self.switch.active)
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
    settle(made.base)
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
    taken = {*PeftModel.__dict__, *Host.__dict__, *dir(nn.Module)}
    for name in dir(PreTrainedModel):
        if name not in taken and not (name.startswith("__") and name.endswith("__")):
            setattr(PeftModel, name, _answered_by_base(name))


_delegate()
