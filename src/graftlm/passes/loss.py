"""The loss of a pass from the hidden states that reach the head: head and cross-entropy of labelled tokens only, the
vocabulary in tiles. All logits are made only if somebody reads them.

Shapes: B rows, T tokens a row as given, P virtual tokens, N labelled tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..kernels import HeadForm, token_losses
from ..kernels.loss import chunked_losses
from ..layers import as_it_was
from ..quantization import quantized_kind
from ..routing import Plan, running
from .facts import Facts
from .output import Hook, with_lazy_logits
from .row import IGNORED
from .state import Call, Form, Pass, Targets

if TYPE_CHECKING:
    from ..adapters import AdapterSet


def take_labels(facts: Facts, plan: Plan, call: Call, form: Form, named: dict) -> Targets:
    """Take the labels out of the inputs as they go into the base (virtual tokens in place)."""
    labels, given = named.pop("labels"), named.pop("shift_labels", None)
    items = named.pop("num_items_in_batch", None)
    if given is not None:
        targets = given
    elif form.shifts:
        targets = torch.full_like(labels, IGNORED)
        targets[:, :-1] = labels[:, 1:]
    else:
        targets = labels
    length, targets = targets.shape[1], targets.flatten()
    places = (targets != IGNORED).nonzero()[:, 0]
    owners = None if plan.routes is None else plan.routes.of.to(places.device)[places // length]
    if facts.takes("use_cache") and named.get("past_key_values") is None and not call.own_positions:
        named["use_cache"] = False  # with positions of one's own transformers' mask depends on it
    return Targets(places=places, targets=targets[places], items=items, owners=owners)


class Loss:
    """The head of one wrapper's base, and what is made of it."""

    def __init__(self, host: AdapterSet, head: Any) -> None:
        self.host, self.head = host, head

    def of(self, now: Pass, output: Any, divides: bool) -> Any:
        """The base's output with the loss of a pass that has ended, and with logits that are made only if they are read.
        `divides`: the model's loss heeds `num_items_in_batch`."""
        hidden, made, form = now.hidden, now.targets, now.form
        assert hidden is not None and made is not None and form is not None
        rows = hidden.reshape(-1, hidden.shape[-1])[made.places]
        now.losses = losses = self.losses(now.scope.plan, made, rows, form.head, now.call.smoothing)
        total, items = losses.sum(), made.items
        if items is not None and (divides or now.call.smoothing):  # whoever smooths a loss outside divides it
            loss = total / (items.to(total.device) if isinstance(items, Tensor) else items)
        else:
            loss = total / losses.shape[0] if losses.shape[0] else total / total.new_zeros(())
        kind = hidden.device.type
        auto = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        return with_lazy_logits(output, loss, lambda: self.logits(now, *auto))

    def losses(self, plan: Plan, made: Targets, rows: Tensor, form: HeadForm, smoothing: float) -> Tensor:
        """Losses [N] of hidden states [N, H]; group by group where the groups' adapters reach the head."""
        if plan.routes is None:
            return self.group_losses(rows, made.targets, form, smoothing)
        plans = [Plan(host.switch, group) for host, group in self.host.owners(plan)]
        heads = []
        for own in plans:
            with running(own):
                heads.append(self.plain_head())
        if heads[0] is not None and all(head is heads[0] for head in heads):
            with running(plans[0]):
                return self.group_losses(rows, made.targets, form, smoothing)
        losses = rows.new_empty(len(made.targets), dtype=torch.float32)
        for i, own in enumerate(plans):
            chosen = (made.owners == i).nonzero()[:, 0]  # type: ignore[union-attr]
            with running(own):
                part = self.group_losses(rows[chosen], made.targets[chosen], form, smoothing)
                losses = losses.index_copy(0, chosen, part)
        return losses

    def group_losses(self, rows: Tensor, targets: Tensor, form: HeadForm, smoothing: float) -> Tensor:
        """Losses [N] of hidden states [N, H] under the running plan, one composition's."""
        plain = self.plain_head()
        kind = rows.device.type
        if plain is None:
            return chunked_losses(self.head, rows, targets, form, smoothing)
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else plain.weight.dtype
        with torch.autocast(kind, enabled=False):
            return token_losses(rows, plain.weight, plain.bias, targets, form, dtype, smoothing)

    def plain_head(self) -> nn.Linear | None:
        """The head where it is a frozen linear layer now; None where it is trained, adapted or quantised."""
        head = self.head
        while True:
            if any(not isinstance(h, Hook) for h in (*head._forward_hooks.values(), *head._forward_pre_hooks.values())):
                return None
            if hasattr(head, "modules_to_save"):
                head = head.active
            elif hasattr(head, "base_layer"):
                if head.active_adapters:
                    return None
                head = head.base_layer
            else:
                break
        head = as_it_was(head)
        frozen = not any(p.requires_grad for p in head.parameters())
        return head if isinstance(head, nn.Linear) and frozen and quantized_kind(head) is None else None

    def logits(self, now: Pass, autocast: bool, dtype: torch.dtype) -> Tensor:
        """All logits, as the plain model gives them: [B, P + T, V], virtual tokens first ([B, T, V] for a Trainer); zero
        states on padding."""
        assert now.hidden is not None and now.form is not None
        hidden = now.layout.restore(now.hidden)
        with running(now.scope.plan), torch.autocast(hidden.device.type, dtype, enabled=autocast):
            return now.form.head.apply(self.head(hidden))
