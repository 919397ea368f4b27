"""The hooks of one wrapper on its base, by which every pass begins and ends.

The wrapper hooks the base model itself, so one mechanism serves `forward`, `generate` with any decoding strategy, and
every task head. Inputs are laid out on the way in, and the outputs' token axis is put back on the way out.
"""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from ..architectures import attention_modules, position_table, position_tables, self_attention_call
from ..architectures.attention import CACHE_NAMES, MASK_NAMES
from ..errors import UnsupportedError
from ..routing import Plan, Scope, current_plan, current_scope
from . import padded, seq2seq
from .facts import Facts, decoder_config
from .inputs import batch_size, by_name, tokens_of
from .invoked import Invocations
from .loss import Loss, take_labels
from .output import Hook
from .packed import Packing
from .prefix import PrefixLayer, prefix_cache
from .refusals import check_cache, check_room, held
from .shortcuts import Shortcuts, Trials
from .state import Call, Pass, Placed, Run, current_pass, current_run, keep_pass

if TYPE_CHECKING:
    from ..adapters import AdapterSet

_direct: ContextVar[int] = ContextVar(
    "graftlm_direct", default=0
)  # how many calls of bases outside their wrappers are running


class Hooks:
    """One wrapper's hooks. `known`: what was tried out on this base so far."""

    def __init__(self, host: AdapterSet, known: list[Trials]) -> None:
        base = host.base
        self.host = host
        self.facts = Facts.of(base)
        self.head: Any = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
        self.packing = Packing(host, self.facts)
        self.shortcuts = Shortcuts(host, self.facts, self.packing, self.head, known)
        self.loss = Loss(host, self.head)
        self.guards = False  # whether calls of the backbone by itself are watched
        encoder = base.get_encoder() if self.facts.encoder_decoder else None
        self.encoder_attention = {id(m): i for i, (_, m) in enumerate(attention_modules(encoder))} if encoder else {}

    # -- placing them ------------------------------------------------------------------------------------------------
    def connect(self) -> list[Any]:
        """Register the hooks; returns their handles."""
        base = self.host.base
        handles = [
            base.register_forward_pre_hook(Hook(self, "before"), with_kwargs=True),
            base.register_forward_hook(Hook(self, "after"), with_kwargs=True, always_call=True),
        ]
        if self.head is not None:
            handles.append(self.head.register_forward_pre_hook(Hook(self, "before_head")))
            handles.append(self.head.register_forward_hook(Hook(self, "after_head")))
        backbone = getattr(base, "base_model", base)
        self.guards = backbone is not base
        if self.guards:
            handles.append(backbone.register_forward_pre_hook(Hook(self, "refuse_backbone")))
        if self.host.has_memory:
            handles += [
                module.register_forward_pre_hook(Hook(self, "restore_memory"), with_kwargs=True)
                for _, module in attention_modules(base)
                if id(module) not in self.encoder_attention
            ]
        return handles + (self.connect_encoder(base) if self.facts.encoder_decoder else [])

    def connect_encoder(self, base: Any) -> list[Any]:
        """The hooks on the encoder of an encoder-decoder model, and on positions that count padding."""
        encoder = base.get_encoder()
        handles = [
            encoder.register_forward_pre_hook(Hook(self, "before_encoder"), with_kwargs=True),
            encoder.register_forward_hook(Hook(self, "after_encoder"), with_kwargs=True, always_call=True),
        ]
        if self.host.has_memory:
            handles += [
                module.register_forward_pre_hook(Hook(self, "add_encoder_memory"), with_kwargs=True)
                for _, module in attention_modules(encoder)
            ]
        halves = ((encoder, "place_positions"), (base.get_decoder(), "place_decoder_positions"))
        for half, hook in halves if not self.facts.takes_positions else ():
            handles += [module.register_forward_hook(Hook(self, hook)) for module in position_tables(half)]
        return handles

    def stale(self) -> bool:
        """Whether the base has another head than when the hooks were placed."""
        return self.head is not None and self.host.base.get_output_embeddings() is not self.head

    def plan(self) -> Plan | None:
        """The running plan if it is this wrapper's."""
        plan = current_plan()
        return plan if plan is not None and plan.switch is self.host.switch else None

    def now(self) -> Pass | None:
        """The pass that runs now if it is this wrapper's."""
        return current_pass(self.host.switch)

    def named(self, args: tuple, kwargs: dict) -> dict:
        """The arguments of a call of the base model by name."""
        return by_name(self.facts.signature, args, kwargs)

    # -- the base model ----------------------------------------------------------------------------------------------
    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Forward pre-hook of the base model: its pass begins."""
        plan = self.plan()
        if plan is None:
            if current_plan() is None and torch.is_grad_enabled():
                self.host.switch.ran = None
            if self.guards:  # else nothing counts it down again
                _direct.set(_direct.get() + 1)
            return None
        run = current_run()
        if run.laid is not None:
            run.laid.begin()
            return None
        named = self.named(args, kwargs)
        self.host.protect_checkpointing(keep_pass)
        check_cache(self.host, plan, named.get("past_key_values"))
        if run.resumed is not None:
            named = self.resume(plan, run, named)
        call = self.call(run, named)
        named, now = self.lay(plan, call, run, named)
        check_room(self.host, self.facts, plan, call, named)
        if call.gives_tuple and isinstance(now.layout, Placed) and now.layout.moved:
            named["return_dict"] = True  # outputs are put in order by their names
        now.begin()
        self.host.remember_pass()
        return (), named

    def call(self, run: Run, named: dict) -> Call:
        """What a call asks for."""
        config = self.host.base.config
        keeps, names = named.get("use_cache"), named.get("return_dict")
        keeps = getattr(decoder_config(self.host.base), "use_cache", False) if keeps is None else keeps
        return Call(
            batch=batch_size(named),
            keeps_cache=bool(keeps) and not self.host.base.training,
            own_positions=named.get("position_ids") is not None,
            gives_tuple=not (getattr(config, "return_dict", True) if names is None else names),
            smoothing=run.smoothing,
            probe=run.probe,
        )

    def lay(self, plan: Plan, call: Call, run: Run, named: dict) -> tuple[dict, Pass]:
        """The inputs of the base, by the short cuts that this call takes, and its pass."""
        invocations = Invocations.of(self.host, plan, run, named)
        form = self.shortcuts.choose(plan, call, named)
        if form is not None and form.packs and (packed := self.packing.lay(plan, named)) is not None:
            inputs, row, labelled, scope = packed
            return inputs, Pass(scope, call, row, labelled, form)
        if self.facts.encoder_decoder:
            if form is not None:
                seq2seq.decoder_inputs(self.host.base, named)
            named, layout = seq2seq.lay(self.host, plan, call, run, named)
        else:
            named, layout = padded.lay(self.host, self.facts, plan, call, named)
        targets = None if form is None else take_labels(self.facts, plan, call, form, named)
        scope = current_scope() or Scope(plan, plan.routes)
        if invocations is not None:
            scope = replace(scope, routes=invocations.routes(layout))
        return named, Pass(scope, call, layout, targets, form)

    def resume(self, plan: Plan, run: Run, named: dict) -> dict:
        """The first pass of a `generate` that goes on from a filled cache: `generate` took the virtual tokens and the prefix
        in the cache for tokens of the inputs, and cut too many of these off."""
        whole, run.resumed = run.resumed, None
        batch = batch_size(named)
        past = held(named["past_key_values"], *self.host.fronts(plan, batch))
        named.pop("position_ids", None)
        for name, value in (whole or {}).items():
            if past >= value.shape[1]:
                raise UnsupportedError(
                    f"past_key_values holds {past} tokens and the inputs have {value.shape[1]}: none is new. Give all "
                    "tokens so far with new ones behind them, or only new ones with the attention_mask of all."
                )
            named[name] = value.repeat_interleave(batch // value.shape[0], 0)[:, past:]
        return named

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Forward hook of the base model, called after failures as well: its pass ends, and outputs along the token axis go
        back to the order they were given in.

        As with HF PEFT the virtual tokens' outputs come first ([B, P + T, …]), unless `drops_virtual`.
        """
        if self.plan() is None:
            if self.guards:
                _direct.set(max(_direct.get() - 1, 0))
            return None
        if (now := self.now()) is None:  # it failed before it began
            return None
        now.end()
        if output is None:  # it failed
            return None
        current_run().ended = now
        if isinstance(now.layout, Placed) and now.layout.memory and not now.call.keeps_cache and hasattr(output, "keys"):
            # the cache holds the prefix alone and cannot be gone on from
            output = type(output)(**{k: v for k, v in output.items() if k != "past_key_values"})
        if isinstance(cache := getattr(output, "past_key_values", None), Cache):
            cache.in_front = self.host.in_front(now.scope.plan)  # type: ignore[attr-defined]
            cache.invoked = current_run().invoked or {}  # type: ignore[attr-defined]
        if now.targets is not None:
            return self.loss.of(now, output, bool(self.shortcuts.trials.divides))
        if isinstance(now.layout, Placed) and now.layout.moved:
            padded.in_given_order(output, now.layout, self.facts.to_left or self.facts.to_right)
            return output.to_tuple() if now.call.gives_tuple else output
        return output

    # -- its head ----------------------------------------------------------------------------------------------------
    def before_head(self, module: nn.Module, args: tuple) -> tuple | None:
        """Pre-hook of the head: keep the hidden states; where the loss is ours, give it none of them."""
        now = self.now()
        if now is None or module is not self.head or not args:
            return None
        if not now.takes_hidden:
            if now.call.probe is not None:
                now.hidden = args[0]
            return None
        if now.hidden is None:
            now.hidden = args[0]
        return (args[0][..., :0, :].detach(), *args[1:])

    def after_head(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        """Hook of the head: what it gives before the model changes it, for trials."""
        now = self.now()
        if now is not None and module is self.head and now.call.probe is not None:
            now.raw = output

    # -- calls that do not go through the wrapper ----------------------------------------------------------------------
    def refuse_backbone(self, module: nn.Module, args: tuple) -> None:
        """Pre-hook of the backbone: called by itself, it would leave out what enters through the wrapper."""
        if current_plan() is not None or _direct.get() or not self.host.switch.enabled:
            return
        if names := [n for n in self.host.switch.active if self.host.methods[n].bound]:
            raise UnsupportedError(
                f"{type(module).__name__}, the backbone of {type(self.host.base).__name__}, is called by itself: "
                f"{', '.join(names)} would be left out. Call the wrapper (output_hidden_states=True gives the backbone's "
                "outputs); for the bare base, call it within disable_adapter()."
            )

    # -- the encoder of an encoder-decoder model -----------------------------------------------------------------------
    def before_encoder(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Forward pre-hook of the encoder: a pass of its own begins, within the model's or by itself."""
        plan = self.plan()
        if plan is None:
            return None
        named = dict(inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments)
        named |= named.pop("kwargs", {})
        if tokens_of(named) is None:  # an encoder of features or images
            return None
        current_run().encoded = True
        model = self.now()
        masked = model.layout.masked if model is not None and isinstance(model.layout, Placed) else 0
        laid = seq2seq.lay_encoder(self.host, self.facts, plan, named, masked)
        if laid is None:
            return None
        named, layout = laid
        scope = current_scope() or Scope(plan, plan.routes)
        Pass(scope, Call(batch=layout.positions.shape[0]), layout, encodes=True).begin()  # type: ignore[union-attr]
        return (), named

    def after_encoder(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Forward hook of the encoder, called after failures as well: virtual tokens first, then the tokens as they were
        given."""
        now = self.now()
        if now is None or not now.encodes:
            return None
        now.end()
        if output is None or not isinstance(now.layout, Placed) or now.layout.order is None:
            return None
        return seq2seq.encoder_in_given_order(output, now.layout.order)

    def place_positions(self, module: Any, args: tuple, output: Tensor) -> Tensor:
        """Forward hook of an encoder's learned positions (BART counts padding): take them from the mask."""
        return self.positions_by_mask(module, output, encodes=True)

    def place_decoder_positions(self, module: Any, args: tuple, output: Tensor) -> Tensor:
        """The same for the decoder, where rows have prefixes of different lengths."""
        return self.positions_by_mask(module, output, encodes=False)

    def positions_by_mask(self, module: Any, output: Tensor, encodes: bool) -> Tensor:
        now = self.now()
        placed = now.layout if now is not None and now.encodes == encodes else None
        positions = placed.positions if isinstance(placed, Placed) else None
        if positions is None:
            return output
        table, first = position_table(module)
        positions = F.pad(positions, (0, max(output.shape[-2] - positions.shape[1], 0)))  # LED fills up rows by itself
        return F.embedding(positions[:, -output.shape[-2] :] + first, table).to(output.dtype)

    # -- attention modules -------------------------------------------------------------------------------------------
    def restore_memory(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Pre-hook of attention: give the prefix back where activation checkpointing has taken the cache away."""
        now = self.now()
        memory = now.layout.memory if now is not None and isinstance(now.layout, Placed) else None
        if not memory or getattr(module, "layer_idx", None) is None:
            return None
        named = self_attention_call(module, args, kwargs)
        if named is None or any(named.get(n) is not None for n in CACHE_NAMES):
            return None
        named[self.cache_name(module)] = prefix_cache(memory)
        return (), named

    def add_encoder_memory(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Pre-hook of the encoder's self-attention: its prefix, and the mask's room for it."""
        now = self.now()
        memory = now.layout.memory if now is not None and now.encodes and isinstance(now.layout, Placed) else None
        named = self_attention_call(module, args, kwargs) if memory else None
        if named is None or memory is None:
            return None
        index = self.encoder_attention[id(module)]
        layers = [PrefixLayer(*memory[index])] * (1 + (getattr(module, "layer_idx", None) or 0))
        named[self.cache_name(module)] = Cache(layers=layers)
        for name in MASK_NAMES:
            if (mask := named.get(name)) is not None:
                fill = True if mask.dtype == torch.bool else (1 if mask.dim() == 2 else 0)
                named[name] = F.pad(mask, (memory[index][0].shape[-2], 0), value=fill)
        return (), named

    @staticmethod
    def cache_name(module: nn.Module) -> str:
        """What an attention module calls its cache."""
        parameters = inspect.signature(module.forward).parameters
        return next(n for n in CACHE_NAMES if n in parameters)
