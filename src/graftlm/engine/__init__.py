"""Training passes that do only the work that counts: logits of labelled tokens, no padding.

In training mode and with labels, the wrapper takes the labels away from the base model, lets its body run once, and makes
the loss itself from the hidden states that reach the head::

    rows    . . a a a        packed  a a a b b b b b        labelled   a a b b b     head and cross-entropy of these only,
            b b b b b   ->           (a to a, b to b)   ->                           the vocabulary in tiles

Nothing of this is assumed of a model: at the first pass a small random batch goes through the plain model and through the
short cuts, and only those that give the same hidden states and the same loss are used (`Engine.form`). Everything else runs
as the plain model would.

Shapes: B rows, T tokens a row as given, P virtual tokens, N tokens of the packed row, H hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..architectures import backbone_embeddings, is_encoder_decoder, token_embeddings
from ..architectures.fast import alibi_slopes, attention_configs, attention_window, has_dropout, packed_attention
from ..errors import UnsupportedError
from ..kernels import HeadForm, Segments, keep_freed_memory, token_losses, varlen
from ..kernels.attention import Piece
from ..kernels.linear import even_rows
from ..kernels.loss import chunked_losses
from ..layers import as_it_was
from ..quantization import quantized_kind
from ..routing import Group, Plan, Routes, current_plan, restore_order, running
from .check import Check, Form, log
from .output import Hook, with_lazy_logits
from .row import IGNORED, Row, Sequences

if TYPE_CHECKING:
    from ..entry import Entry
    from ..host import Host

__all__ = ["Engine", "Form"]

MANY, TINY = 16, 24  # sequences, and their mean length in tokens, at which packing is weighed against padding
# What a packed call may carry; anything else (images, token types) goes the padded way.
PACKABLE = {
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "shift_labels", "num_items_in_batch",
    "use_cache", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits",
}  # fmt: skip


class Engine:
    """The short cuts of one wrapper."""

    def __init__(self, host: Host, entry: Entry) -> None:
        self.host = host
        self.entry = entry
        base = host.base
        self.head: Any = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
        self.configs = attention_configs(base)
        self.window = attention_window(base)
        self.slopes = alibi_slopes(base)
        self.shares_virtual = not has_dropout(base)
        self.forms: dict[tuple, Form | None] = {}
        self.divides: bool | None = None  # whether the model's loss heeds `num_items_in_batch`

    def connect(self) -> list[Any]:
        """Register the hooks on the head; returns their handles."""
        if self.head is None:
            return []
        before, after = Hook(self, "before_head"), Hook(self, "after_head")
        return [self.head.register_forward_pre_hook(before), self.head.register_forward_hook(after)]

    # -- which way a pass goes ---------------------------------------------------------------------------------------
    def enter(self, plan: Plan, named: dict, otherwise: Callable[[Plan, dict], dict]) -> dict:
        """Inputs of the base for this call; `otherwise` is the plain way in. The labels are taken away if a short cut is."""
        way = plan.scratch["way"] = self.way(plan, named)
        form = plan.scratch["form"] = None if way == "plain" else plan.form or self.form(plan)
        if form is None:
            if plan.smoothing:
                raise UnsupportedError(
                    f"label_smoothing={plan.smoothing}: this pass of {type(self.host.base).__name__} makes all its "
                    "logits; compute the smoothed loss from them. (The model takes label_smoothing where "
                    "`makes_loss(inputs)` is true.)"
                )
            plan.scratch["way"] = "plain"
            return otherwise(plan, named)
        if named.get("num_items_in_batch") is not None:
            self.heeds_items(plan)
        if way == "packed" and form.packs:
            packed = self.pack(plan, named)
            if packed is not None:
                return packed
        plan.scratch["way"] = "padded"
        plan.scratch["own_positions"] = named.get("position_ids") is not None
        if is_encoder_decoder(self.host.base):
            self.decoder_inputs(named)
        named = otherwise(plan, named)
        self.take_labels(plan, named)
        return named

    def heeds_items(self, plan: Plan) -> bool:
        """Whether the plain model's loss is divided by `num_items_in_batch`."""
        if self.divides is None:
            host, group = self.host.owners(plan)[0]
            self.divides = Check(self, Plan(self.host.switch, group if host is self.host else ())).heeds_items()
        return self.divides

    def way(self, plan: Plan, named: dict) -> str:
        """ "packed", "padded" or "plain": which short cuts this call allows at all."""
        if plan.way is not None:
            return plan.way
        base, labels = self.host.base, named.get("labels")
        if not (base.training and self.host.lean and self.head is not None and isinstance(labels, Tensor)):
            return "plain"
        config = base.config
        asks = any(self.asked(named, k) for k in ("output_attentions", "output_hidden_states", "output_router_logits"))
        asks = asks or any(k not in self.entry.signature.parameters and k not in PACKABLE for k in named)  # for the loss
        short = named.get("logits_to_keep")
        keeps = (
            named.get("past_key_values") is not None or named.get("use_cache") or (short is not None and not _zero(short))
        )
        tuples = not named.get("return_dict", getattr(config, "return_dict", True))
        if asks or keeps or tuples or labels.dim() != 2 or torch.compiler.is_compiling():
            return "plain"
        given = next((named[k] for k in ("input_ids", "inputs_embeds") if named.get(k) is not None), None)
        if is_encoder_decoder(base):
            return "padded"
        mask = named.get("attention_mask")
        if (
            given is None
            or given.shape[:2] != labels.shape
            or (mask is not None and getattr(mask, "shape", None) != labels.shape)
        ):
            return "plain"
        extra = any(v is not None and k not in PACKABLE for k, v in named.items())
        extra = extra or hasattr(token_embeddings(base), "neftune_noise_alpha")  # noise scaled by the row's length
        extra = extra or (named.get("position_ids") is not None and named["position_ids"].dim() != 2)
        extra = extra or not self.packs_on(labels.device, mixed=plan.routes is not None)
        return "padded" if extra or not self.host.packs else "packed"

    def packs_on(self, device: torch.device, mixed: bool = False) -> bool:
        """Whether packed rows are tried on a device: on GPUs only where its flash kernel does all of their attention."""
        if device.type == "cpu":
            return True
        auto = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if auto else self.host._float_dtype()
        return not mixed and self.shares_virtual and self.slopes is None and varlen.takes(device, dtype)

    def asked(self, named: dict, name: str) -> bool:
        """Whether an extra output is asked for: by the call, the configuration, or the model's own default."""
        if named.get(name) is not None:
            return bool(named[name])
        parameter = self.entry.signature.parameters.get(name)
        return bool(getattr(self.host.base.config, name, False) or (parameter is not None and parameter.default is True))

    def stale(self) -> bool:
        """Whether the base has another head than when the hooks were placed."""
        base = self.host.base
        return self.head is not None and base.get_output_embeddings() is not self.head

    # -- the packed row ----------------------------------------------------------------------------------------------
    def pack(self, plan: Plan, named: dict) -> dict | None:
        """All rows as one, without padding; None where these rows cannot be packed. It is laid out on the CPU."""
        device = named["labels"].device
        keys = ("labels", "shift_labels", "attention_mask", "position_ids")
        named = named | {k: named[k].cpu() for k in keys if named.get(k) is not None}
        found = Sequences.of(*(named.get(k) for k in keys))  # type: ignore[arg-type]
        if found is None:
            return None
        groups = torch.zeros_like(found.starts)
        if plan.routes is not None:
            found, groups = found.sorted(plan.routes.of[found.kept[found.starts] // named["labels"].shape[1]])
        counts, prefixes = zip(*(host.counts(group) for host, group in self.host.owners(plan)), strict=True)
        fronts = torch.tensor([counts, prefixes])[:, groups]
        if not self.fits(found, named, groups, *fronts):
            return None
        memories, which = self.memories(plan, prefixes)
        row = Row.of(found.sizes.tolist(), groups.tolist(), list(counts), which, self.shares_virtual)
        inputs: dict[str, Any] = self.packed_inputs(plan, named, found.kept, row)
        own = found.positions + fronts.sum(0).repeat_interleave(found.sizes)
        positions = row.spread(own, [torch.arange(p, p + c) for c, p in zip(counts, prefixes, strict=True)])
        if self.entry.takes_positions:
            inputs["position_ids"] = positions[None].to(device)
        length = len(positions)
        filler = even_rows(length)  # a sequence of nothing
        inputs = {k: F.pad(v, (0, 0) * (v.dim() - 2) + (0, filler)) for k, v in inputs.items()}
        inputs |= {"use_cache": False} if "use_cache" in self.entry.signature.parameters else {}
        inputs |= {"return_dict": named["return_dict"]} if named.get("return_dict") is not None else {}
        pieces = row.pieces + [Piece(length, length + filler)] * (filler > 0)
        owners = F.pad(row.owners, (0, filler), value=-1)  # of nobody
        routes = None if plan.routes is None else plan.routes.over(owners)
        for i, draws in enumerate((plan.routes.draws if plan.routes is not None else None) or ()):
            draws.extra = even_rows(int((row.owners == i).sum()))
        plan.segments = Segments(pieces, memories, self.slopes)
        plan.around = functools.partial(self.packed, routes)  # no cycle: graphs would outlive their step
        plan.scratch["leave"] = stack = ExitStack()
        stack.enter_context(plan.around(plan))
        places, targets = self.targets(named, found, row)
        loss = places.to(device), targets.to(device), named.get("num_items_in_batch")
        plan.scratch |= {"loss": loss, "owners": row.owners[places]}
        most = 0 if self.entry.drops_virtual(named) else max(counts)
        plan.scratch["unpack"] = named["labels"].shape, found, row, most
        return inputs

    @contextmanager
    def packed(self, routes: Routes | None, plan: Plan) -> Iterator[None]:
        """Within the block the base runs over a packed row, whose tokens go through `routes`."""
        before, plan.routes = plan.routes, routes
        try:
            with packed_attention(self.configs):
                yield
        finally:
            plan.routes = before

    def memories(self, plan: Plan, prefixes: tuple[int, ...]) -> tuple[list, list[int | None]]:
        """The prefixes that take part, and which of them is whose group's."""
        made: list = []
        which: list[int | None] = []
        for memory, prefix in zip(self.host.asked(plan, lambda host, group: host.memory(group)), prefixes, strict=True):
            which.append(len(made) if prefix else None)
            made += [memory] if prefix else []
        return made, which

    def fits(self, found: Sequences, named: dict, groups: Tensor, counts: Tensor, prefixes: Tensor) -> bool:
        """Whether these sequences, packed, give what the plain model gives; groups, virtual tokens and prefix entries
        [sequences]."""
        if self.window and int((found.sizes + counts + prefixes).max()) > self.window:
            return False
        many = groups.bincount()  # of each group's own sequences, as it would be alone
        tokens = torch.zeros_like(many).index_add_(0, groups, found.sizes)
        crowded = bool(((many > MANY) & (tokens < TINY * many)).any())
        if crowded and 2 * len(found.kept) > named["labels"].numel():
            return False  # a step for each of many tiny sequences costs more than their padding
        if bool(((counts + prefixes > 0) & (found.positions[found.starts] > 0)).any()):
            return False  # positions of one's own, with no place in front for virtual tokens or a prefix
        if named.get("shift_labels") is not None:
            return True
        # the plain model predicts a row's first token from the padding (or the sequence) before it
        behind = (found.kept[found.starts] % named["labels"].shape[1] > 0) & (counts == 0)
        return not bool((named["labels"].flatten()[found.kept][found.starts][behind] != IGNORED).any())

    def targets(self, named: dict, found: Sequences, row: Row) -> tuple[Tensor, Tensor]:
        """Places in the packed row that have something to predict, and what [labelled]."""
        places = row.tokens
        if named.get("shift_labels") is not None:
            targets = named["shift_labels"].flatten()[found.kept]
        else:
            labels = named["labels"].flatten()[found.kept]
            targets = torch.full_like(labels, IGNORED)
            targets[:-1] = torch.where(found.opens[1:], IGNORED, labels[1:])
            # the last virtual token predicts the first real one
            last = torch.tensor([end - 1 for _, end in row.virtual])
            places = torch.cat((places, last[last >= 0]))
            targets = torch.cat((targets, labels[found.starts][last >= 0]))
        chosen = (targets != IGNORED).nonzero()[:, 0]
        return places[chosen], targets[chosen]

    def packed_inputs(self, plan: Plan, named: dict, kept: Tensor, row: Row) -> dict[str, Tensor]:
        """`input_ids` or `inputs_embeds` of the packed row."""
        embeds, ids = named.get("inputs_embeds"), named.get("input_ids")
        virtual = self.host.asked(plan, lambda host, group: host.virtual_tokens(group))
        if embeds is None and not any(v is not None for v in virtual):
            return {"input_ids": ids.flatten()[kept][None]}  # type: ignore[union-attr]
        if embeds is None:
            embeds = self.embedded(plan, ids.flatten()[kept][None], row)[0]  # type: ignore[union-attr]
        else:
            embeds = embeds.flatten(0, 1)[kept]
        return {"inputs_embeds": row.spread(embeds, virtual)[None]}

    def embedded(self, plan: Plan, ids: Tensor, row: Row) -> Tensor:
        """Embeddings [1, N, H] of the real tokens; the embedding layer may carry adapters."""
        before = plan.routes
        plan.routes = None if before is None else before.over(row.owners[row.tokens])
        try:
            return backbone_embeddings(self.host.base)(ids)
        finally:
            plan.routes = before

    def leave(self, plan: Plan) -> None:
        """The base has run (or failed): its attention is its own again."""
        if (stack := plan.scratch.pop("leave", None)) is not None:
            stack.close()

    # -- the padded batch --------------------------------------------------------------------------------------------
    def decoder_inputs(self, named: dict) -> None:
        """An encoder-decoder model makes its decoder's inputs out of the labels."""
        if named.get("decoder_input_ids") is None and named.get("decoder_inputs_embeds") is None:
            named["decoder_input_ids"] = self.host.base.prepare_decoder_input_ids_from_labels(named["labels"])

    def take_labels(self, plan: Plan, named: dict) -> None:
        """Take labels out of the inputs as they go into the base (virtual tokens in place)."""
        labels, given = named.pop("labels"), named.pop("shift_labels", None)
        items = named.pop("num_items_in_batch", None)
        if given is not None:
            targets = given
        elif plan.scratch["form"].shifts:
            targets = torch.full_like(labels, IGNORED)
            targets[:, :-1] = labels[:, 1:]
        else:
            targets = labels
        length, targets = targets.shape[1], targets.flatten()
        places = (targets != IGNORED).nonzero()[:, 0]
        plan.scratch["loss"] = places, targets[places], items
        if plan.routes is not None:
            plan.scratch["owners"] = plan.routes.of.to(places.device)[places // length]
        takes = "use_cache" in self.entry.signature.parameters
        if takes and named.get("past_key_values") is None and not plan.scratch["own_positions"]:
            named["use_cache"] = False  # with positions of one's own transformers' mask depends on it

    # -- the head ----------------------------------------------------------------------------------------------------
    def mine(self) -> Plan | None:
        """The running plan if it is this wrapper's and within its base."""
        plan = current_plan()
        return plan if plan is not None and plan.switch is self.host.switch and "way" in plan.scratch else None

    def before_head(self, module: nn.Module, args: tuple) -> tuple | None:
        """Pre-hook of the head: keep the hidden states; where the loss is ours, give it none of them."""
        plan = self.mine()
        if plan is None or module is not self.head or not args or plan.scratch.get("made"):
            return None
        if plan.scratch["way"] == "plain":
            if plan.form_check:
                plan.scratch["hidden"] = args[0]
            return None
        plan.scratch.setdefault("hidden", args[0])
        return (args[0][..., :0, :].detach(), *args[1:])

    def after_head(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        """Hook of the head: what it gives before the model changes it, for `form`."""
        plan = self.mine()
        if plan is not None and module is self.head and plan.form_check:
            plan.scratch["raw"] = output

    def leave_base(self, plan: Plan, output: Any) -> Any:
        """The base's output with the loss, and with logits that are made only if they are read."""
        form, hidden = plan.scratch["form"], plan.scratch["hidden"]
        kind = hidden.device.type
        plan.scratch |= {"made": True, "autocast": torch.is_autocast_enabled(kind), "dtype": torch.get_autocast_dtype(kind)}
        places, targets, items = plan.scratch["loss"]
        rows = hidden.reshape(-1, hidden.shape[-1])[places]
        losses = self.losses(plan, rows, targets, form.head)
        plan.scratch["losses"] = losses
        total = losses.sum()
        if items is not None and (self.divides or plan.smoothing):  # whoever smooths a loss outside divides it
            loss = total / (items.to(total.device) if isinstance(items, Tensor) else items)
        else:
            loss = total / losses.shape[0] if losses.shape[0] else total / total.new_zeros(())
        return with_lazy_logits(output, loss, lambda: self.logits(plan))

    def losses(self, plan: Plan, rows: Tensor, targets: Tensor, form: HeadForm) -> Tensor:
        """Losses [N] of hidden states [N, H]; group by group where the groups' adapters reach the head."""
        if plan.routes is None:
            return self.group_losses(rows, targets, form, plan.smoothing)
        plans = [Plan(host.switch, group) for host, group in self.host.owners(plan)]
        heads = []
        for own in plans:
            with running(own):
                heads.append(self.plain_head())
        if heads[0] is not None and all(head is heads[0] for head in heads):
            with running(plans[0]):
                return self.group_losses(rows, targets, form, plan.smoothing)
        losses = rows.new_empty(len(targets), dtype=torch.float32)
        for i, own in enumerate(plans):
            chosen = (plan.scratch["owners"] == i).nonzero()[:, 0]
            with running(own):
                made = self.group_losses(rows[chosen], targets[chosen], form, plan.smoothing)
                losses = losses.index_copy(0, chosen, made)
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

    def logits(self, plan: Plan) -> Tensor:
        """All logits, as the plain model gives them: [B, P + T, V], virtual tokens first ([B, T, V] for a Trainer); zero
        states on padding."""
        hidden, scratch = plan.scratch["hidden"], plan.scratch
        if scratch["way"] == "packed":
            (batch, length), found, row, most = scratch["unpack"]
            packed = hidden[0]
            at = found.kept.to(packed.device)
            hidden = packed.new_zeros(batch * length, packed.shape[-1]).index_copy(0, at, packed[row.tokens])
            hidden = hidden.view(batch, length, -1)
            if most:
                rows = (found.kept[found.starts] // length).tolist()
                pairs = [
                    (r * most + most - end + p, p)
                    for r, (start, end) in zip(rows, row.virtual, strict=True) for p in range(start, end)
                ]  # fmt: skip
                to, origin = torch.tensor(pairs, device=packed.device).T
                front = packed.new_zeros(batch * most, packed.shape[-1]).index_copy(0, to, packed[origin])
                hidden = torch.cat((front.view(batch, most, -1), hidden), dim=1)
        elif "order" in scratch:
            hidden = restore_order(hidden, scratch["order"])
        if scratch.get("drop"):
            hidden = hidden[:, scratch["count"] :]
        with running(plan), torch.autocast(hidden.device.type, scratch["dtype"], enabled=scratch["autocast"]):
            return scratch["form"].head.apply(self.head(hidden))

    # -- what holds for this model -----------------------------------------------------------------------------------
    def form(self, plan: Plan) -> Form | None:
        """The short cuts that give what the plain model gives, under adapters of this kind; None for none."""
        forms = [host.entry.engine.group_form(group) for host, group in self.host.owners(plan)]
        known = [f for f in forms if f is not None]
        return replace(known[0], packs=all(f.packs for f in known)) if len(known) == len(forms) else None

    def group_form(self, group: Group) -> Form | None:
        """The same for one composition of adapters."""
        kind = self.host.adapter_device.type
        auto = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = (*(c > 0 for c in self.host.counts(group)), getattr(self.host.base, "loss_function", None), kind, auto)
        if key not in self.forms:
            if kind == "cpu":
                keep_freed_memory()
            try:
                self.forms[key] = Check(self, Plan(self.host.switch, group)).form()
            except Exception as error:  # a model that cannot be run like this: it runs as it is
                log.info("%s is trained without short cuts: %s", type(self.host.base).__name__, error)
                self.forms[key] = None
        return self.forms[key]


def _zero(value: Any) -> bool:
    return isinstance(value, int) and value == 0
