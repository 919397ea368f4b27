"""The wrapper: a frozen base model with adapters attached, switched, composed, merged, run and saved."""

from __future__ import annotations

import functools
import os
import pickle
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from . import checkpoint, converting, generating, merging, status
from .adapters import AdapterSet
from .architectures import is_plain
from .attached import _SETS
from .delegating import answer_by_base, class_over, moved_to_base, reads_backbone, rebuild, skips_a_level
from .errors import AdapterError, ConfigError
from .generating import refuse_half_on_cpu
from .layers import unsave_modules
from .methods import PeftConfig
from .mixing import plan_of, prompt_of, try_out, with_tasks
from .passes.hooks import Hooks
from .passes.inputs import batch_size, rows_of
from .passes.output import add_to_loss
from .passes.run import run
from .routing import running


class PeftModel(AdapterSet, PreTrainedModel):
    """A base model with adapters.

    It is a `PreTrainedModel` by type, so that a plain `transformers.Trainer` saves and resumes adapters through
    `save_pretrained` and `load_state_dict`; everything it does not define itself is answered by the base model.

    Args:
        model: the base, a transformers model or any module. Its parameters are frozen; they change by merging only.
        peft_config: configuration of the first adapter.
        adapter_name: its name.
        autocast_adapter_dtype: keep adapters of a 16-bit base in fp32.
    """

    def __new__(cls, model: nn.Module | None = None, peft_config: Any = None, *args: Any, **kwargs: Any) -> PeftModel:
        if isinstance(model, PeftModel):
            raise AdapterError("This model is wrapped already. Add another adapter with model.add_adapter(name, config).")
        if not isinstance(model, nn.Module):
            raise AdapterError(
                f"Expected a transformers model as the base, or another torch module; got "
                f"{model if model is None else type(model)}."
            )
        return object.__new__(class_over(cls, type(model), is_plain(model), getattr(peft_config, "task_type", None)))

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

    # -- what HF PEFT answers ----------------------------------------------------------------------------------------
    @property
    def active_peft_config(self) -> PeftConfig:
        return self.methods[self.active_adapter].config

    @property
    def peft_type(self) -> Any:
        return self.active_peft_config.peft_type

    @property
    def modules_to_save(self) -> set[str] | None:
        names = {n for c in self.peft_config.values() for n in getattr(c, "modules_to_save", None) or ()}
        return names or None

    @property
    def _hf_peft_config_loaded(self) -> bool:  # a plain Trainer lets a quantised model with adapters pass by this
        return True

    def _get_name(self) -> str:
        """The base's class name: a plain Trainer shifts the labels of causal language models by it."""
        return self.base._get_name()

    def train(self, mode: bool = True) -> PeftModel:
        return nn.Module.train(self, mode)  # the base does what a transformers model does beside

    def __repr__(self) -> str:
        return nn.Module.__repr__(self).replace(f"{self._get_name()}(", "PeftModel(", 1)

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if "_modules" not in self.__dict__ or "base_model" not in self._modules:
                raise
            return self.base if name == "model" and skips_a_level(self) else getattr(self.base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """What the base has and the wrapper has not is set on the base (`model.generation_config = …`)."""
        base = self.__dict__.get("_modules", {}).get("base_model")
        if name == "forward" and reads_backbone(value):
            base.model.forward = moved_to_base(self, value)
            return
        known = name in self.__dict__ or hasattr(type(self), name) or isinstance(value, (nn.Module, nn.Parameter))
        if base is not None and not known and name != "entry" and hasattr(base.model, name):
            setattr(base.model, name, value)
        else:
            super().__setattr__(name, value)

    def __reduce__(self) -> Any:
        self._disconnect()
        try:
            state = {k: v for k, v in self.__dict__.items() if k != "entry"}
            return rebuild, (PeftModel, type(self.base), pickle.dumps(state), self.plain, self.task_type)
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

    def _enter(self) -> list[Any]:
        if self.plain:
            return []
        over_base = [self, *_SETS.get(self.base, ())]
        self.entry = Hooks(self, [host.entry.shortcuts.trials for host in over_base if "entry" in vars(host)])
        return self.entry.connect()

    # -- running -----------------------------------------------------------------------------------------------------
    def _run(self, *args: Any, **kwargs: Any) -> Any:
        refuse_half_on_cpu(self)
        names = kwargs.pop("adapter_names", None)
        if self.plain:
            plan = plan_of(self, names, None if names is None else rows_of((args, kwargs)), (args, kwargs))
            with running(plan):
                self.remember_pass()
                output = self.base_model(*args, **kwargs)
                self.watch_pass(output)
            if self.training and getattr(output, "loss", None) is not None:
                add_to_loss(output, self.penalty(plan.adapters))
            return output
        if self.entry.stale():
            self._connect()
        tasks = kwargs.pop("task_ids", None)
        smoothing = kwargs.pop("label_smoothing", None) or 0.0
        if not 0 <= smoothing < 1:
            raise ConfigError(f"label_smoothing={smoothing}: expected a share of at least 0 and below 1.")
        rows = batch_size(self.entry.named(args, kwargs)) if names is not None or self.has_tasks else None
        plan = plan_of(self, names, None if names is None else rows, (args, kwargs))
        if self.has_tasks:
            plan = with_tasks(self, plan, tasks, rows)  # type: ignore[arg-type]
        output = run(self, plan, kwargs, *args, smoothing=smoothing)[1]
        if self.training and getattr(output, "loss", None) is not None:
            add_to_loss(output, self.penalty(plan.adapters))
        return output

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
        if inputs is not None and not self.plain:
            inputs = {k: v for k, v in inputs.items() if k not in ("adapter_names", "task_ids", "label_smoothing")}
            if self.entry.shortcuts.way(plan_of(self), inputs) == "plain":
                return False
        return self._training_form() is not None

    def _training_form(self) -> Any:
        """The short cuts of training passes; None for none."""
        if self.plain:
            return None
        if self.entry.stale():
            self._connect()
        return self.entry.shortcuts.training_form(plan_of(self))

    def try_out(self, adapter_names: Sequence[str | Sequence[str]] | None = None) -> None:
        """Try out now what passes of these adapters or compositions (every adapter by itself) would try out when they first
        come, so that none of them waits for it; see `mixing.try_out`."""
        if self.plain:  # by its first batch: there are no inputs to make up
            return
        if self.entry.stale():
            self._connect()
        try_out(self, adapter_names)

    def heeds_items(self) -> bool:
        """Whether the base's training loss is divided by `num_items_in_batch`; tried once."""
        return not self.plain and self.entry.shortcuts.heeds_items(plan_of(self))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of the base model in evaluation mode, with the active adapters. Takes all that it takes, and
        `adapter_names` and `task_ids`, one a row (see `mixing`)."""
        return generating.generate(self, args, kwargs)

    # -- merging -----------------------------------------------------------------------------------------------------
    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `convert_to_lora` takes an adapter."""
        self._known(adapter_name)
        return converting.hindrance(self, adapter_name) is None

    def merge_adapter(
        self, adapter_names: str | list[str] | None = None, safe_merge: bool = False, requantize: bool = False
    ) -> None:
        """Fold adapters (the active ones) into the base weights, reversibly: the model computes the same, faster.

        Which adapters act is said by `set_adapter` as before: passes that others go through, that go through none, or that
        train, are computed by the weights as they were. Where some of `adapter_names` are not active, they and what is
        merged already become active; a warning names active ones that no longer are.

        A quantised layer becomes a bf16 copy, or with `requantize` a layer of its own kind again; by how much the logits
        move is printed.

        Raises:
            UnsupportedError: a method without merge (soft prompts, bottleneck adapters).
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names or self.switch.active)
        self._known(*names)
        merging.merge_active(self, names, safe=safe_merge, requantize=requantize)

    def unmerge_adapter(self) -> None:
        """Undo `merge_adapter`; the base weights come back bit for bit, and what it made active is so no longer."""
        merging.unmerge(self)
        merging.active_as_before(self)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        requantize: bool = False,
    ) -> nn.Module:
        """The base with the adapters folded in for good; it saves as plain transformers. As `merge_adapter` otherwise."""
        return merging.merge_and_unload(self, safe_merge, adapter_names, requantize)

    def unload(self) -> nn.Module:
        """The base as it was, without any adapter."""
        self.unmerge_adapter()
        for name in list(self.methods):
            self.methods[name].detach(self)
            unsave_modules(self.base, self.switch, name)
        self.methods.clear()
        self.configs.clear()
        self.switch.active = ()
        self._forget()
        return self.base

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str, **options: Any) -> None:
        """A new LoRA adapter out of several; see `graftlm.merging.add_weighted_adapter`."""
        merging.add_weighted_adapter(self, adapters, weights, adapter_name, **options)

    def get_layer_status(self) -> list[Any]:
        """One entry an adapted place: what is attached, active, merged and trainable there."""
        return status.layer_status(self)

    def get_model_status(self) -> Any:
        """The same for the model as a whole."""
        return status.model_status(self)

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
        wrapper = cls.__new__(cls, model, config)
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

    def get_prompt(self, batch_size: int, task_ids: Any = None, max_cache_len: int | None = None) -> Any:
        """See `mixing.prompt_of`. `max_cache_len` is without meaning: the cache grows."""
        return prompt_of(self, batch_size, task_ids)

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
    """Freeze a model (transformers', or any torch module) and attach a new adapter.

    `mixed` is accepted: adapters of different methods always compose here.
    """
    if revision is not None:
        if peft_config.revision not in (None, revision):
            warnings.warn(
                f"revision={revision!r} takes the place of the configuration's {peft_config.revision!r}.", stacklevel=2
            )
        peft_config.revision = revision
    return PeftModel(model, peft_config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)


answer_by_base(PeftModel, PreTrainedModel, {*PeftModel.__dict__, *dir(AdapterSet)})
