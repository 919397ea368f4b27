"""Which short cuts a training pass takes: logits of labelled tokens only, no padding.

In training mode and with labels, the wrapper takes the labels away from the base model, lets its body run once, and makes
the loss itself from the hidden states that reach the head::

    rows    . . a a a        packed  a a a b b b b b        labelled   a a b b b     head and cross-entropy of these only,
            b b b b b   ->           (a to a, b to b)   ->                           the vocabulary in tiles

Nothing of this is assumed of a model: at the first pass a small random batch goes through the plain model and through the
short cuts, and only those that give the same hidden states and the same loss are used (`Shortcuts.form`). Everything else
runs as the plain model would.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..architectures import token_embeddings
from ..errors import UnsupportedError
from ..kernels import keep_freed_memory
from ..routing import Group, Plan
from .facts import Facts
from .inputs import tokens_of
from .invoked import waits
from .packed import Packing
from .state import Call, Form
from .trial import Check, log

if TYPE_CHECKING:
    from ..adapters import AdapterSet

# What a packed call may carry; anything else (images, token types) goes the padded way.
PACKABLE = {
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "shift_labels", "num_items_in_batch",
    "use_cache", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits",
}  # fmt: skip
EXTRA_OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits")


class Trials:
    """What trials have shown of a base with this head. Its wrappers share it, and new adapters leave it as it is.

    Attributes:
        forms: the short cuts that hold, by what they depend on (see `Shortcuts.group_form`).
        divides: whether the model's loss heeds `num_items_in_batch`; None before it was tried.
    """

    def __init__(self, head: Any) -> None:
        self.head = head
        self.forms: dict[tuple, Form | None] = {}
        self.divides: bool | None = None


class Shortcuts:
    """The short cuts of one wrapper. `known`: the trials of this base's wrappers so far."""

    def __init__(self, host: AdapterSet, facts: Facts, packing: Packing, head: Any, known: list[Trials]) -> None:
        self.host, self.facts, self.packing = host, facts, packing
        self.trials = next((trials for trials in known if trials.head is head), None) or Trials(head)

    def choose(self, plan: Plan, call: Call, named: dict) -> Form | None:
        """The short cuts of a call; None where the base is to make all logits and its own loss."""
        if call.probe is not None:
            form = call.probe.form
        elif (way := self.way(plan, named)) == "plain":
            form = None
        elif (form := self.form(plan)) is not None and way == "padded":
            form = replace(form, packs=False)
        if form is not None and named.get("num_items_in_batch") is not None:
            self.heeds_items(plan)
        if form is None and call.smoothing:
            raise UnsupportedError(
                f"label_smoothing={call.smoothing}: this pass of {type(self.host.base).__name__} makes all its "
                "logits; compute the smoothed loss from them. (The model takes label_smoothing where "
                "`makes_loss(inputs)` is true.)"
            )
        return form

    # -- what the call allows ----------------------------------------------------------------------------------------
    def way(self, plan: Plan, named: dict) -> str:
        """ "packed", "padded" or "plain": which short cuts this call allows at all."""
        base, labels = self.host.base, named.get("labels")
        if not (base.training and self.host.lean and self.trials.head is not None and isinstance(labels, Tensor)):
            return "plain"
        if self.asks_for_more(named) or labels.dim() != 2 or torch.compiler.is_compiling():
            return "plain"
        if self.facts.encoder_decoder:
            return "padded"
        given, mask = tokens_of(named), named.get("attention_mask")
        if given is None or given.shape[:2] != labels.shape:
            return "plain"
        if mask is not None and getattr(mask, "shape", None) != labels.shape:
            return "plain"
        return "packed" if self.host.packs and self.packable(plan, named, labels.device) else "padded"

    def asks_for_more(self, named: dict) -> bool:
        """Whether a call wants more than a loss and logits: other outputs, a cache, a tuple, arguments of its loss."""
        short = named.get("logits_to_keep")
        return (
            any(self.asked(named, k) for k in EXTRA_OUTPUTS)
            or any(not self.facts.takes(k) and k not in PACKABLE for k in named)
            or named.get("past_key_values") is not None
            or bool(named.get("use_cache"))
            or (short is not None and not (isinstance(short, int) and short == 0))
            or not named.get("return_dict", getattr(self.host.base.config, "return_dict", True))
        )

    def packable(self, plan: Plan, named: dict, device: torch.device) -> bool:
        """Whether nothing in a call needs its rows as they are."""
        positions = named.get("position_ids")
        return (
            all(v is None or k in PACKABLE for k, v in named.items())
            and not hasattr(token_embeddings(self.host.base), "neftune_noise_alpha")  # noise scaled by the row's length
            and (positions is None or positions.dim() == 2)
            and (self.facts.per_layer is None or named.get("inputs_embeds") is None)
            and self.packing.packs_on(device, mixed=plan.routes is not None)
        )

    def asked(self, named: dict, name: str) -> bool:
        """Whether an extra output is asked for: by the call, the configuration, or the model's own default."""
        if named.get(name) is not None:
            return bool(named[name])
        parameter = self.facts.signature.parameters.get(name)
        return bool(getattr(self.host.base.config, name, False) or (parameter is not None and parameter.default is True))

    # -- what holds for this model -----------------------------------------------------------------------------------
    def form(self, plan: Plan) -> Form | None:
        """The short cuts that give what the plain model gives, under adapters of this kind; None for none."""
        forms = [host.entry.shortcuts.group_form(group) for host, group in self.host.owners(plan)]
        known = [f for f in forms if f is not None]
        if len(known) < len(forms) or waits(self.host, plan, self.trials.head):  # the head would need each token's adapters
            return None
        return replace(known[0], packs=all(f.packs for f in known) and not waits(self.host, plan))

    def group_form(self, group: Group) -> Form | None:
        """The same for one composition of adapters; it depends on their kinds, not on which they are."""
        kind = self.host.adapter_device.type
        auto = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        kinds = frozenset(self.kind(name) for name in group)
        key = kinds, getattr(self.host.base, "loss_function", None), kind, auto
        forms = self.trials.forms
        if key not in forms:
            if kind == "cpu":
                keep_freed_memory()
            try:
                forms[key] = Check(self.host, Plan(self.host.switch, group)).form()
            except Exception as error:  # a model that cannot be run like this: it runs as it is
                log.info("%s is trained without short cuts: %s", type(self.host.base).__name__, error)
                forms[key] = None
        return forms[key]

    def kind(self, name: str) -> tuple:
        """What short cuts can depend on of an adapter: its method, and modules of its own in place of the base's."""
        method = self.host.methods[name]
        return type(method), frozenset(getattr(method.config, "modules_to_save", None) or ())

    def training_form(self, plan: Plan) -> Form | None:
        """The short cuts of training passes that ask for nothing but the loss; None for none."""
        asked = any(self.asked({}, k) for k in EXTRA_OUTPUTS)
        return self.form(plan) if self.host.lean and self.trials.head is not None and not asked else None

    def heeds_items(self, plan: Plan) -> bool:
        """Whether the plain model's loss is divided by `num_items_in_batch`."""
        if self.trials.divides is None:
            host, group = self.host.owners(plan)[0]
            self.trials.divides = Check(self.host, Plan(self.host.switch, group if host is self.host else ())).heeds_items()
        return self.trials.divides
