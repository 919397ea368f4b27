"""All rows of a training batch as one, without padding: each sequence attends to itself, a prefix and shared virtual tokens.

Shapes: B rows, T tokens a row as given, P virtual tokens, N tokens of the packed row, H hidden size::

    rows    . . a a a        packed  a a a b b b b b
            b b b b b   ->           (a to a, b to b)
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..architectures import backbone_embeddings, blank_ids, per_layer_inputs
from ..architectures.fast import alibi_slopes, attention_configs, attention_window, has_dropout, packed_attention
from ..kernels import Segments, varlen
from ..kernels.attention import Piece
from ..kernels.linear import even_rows
from ..routing import Plan, Routes, Scope, within
from .facts import Facts
from .padded import drops_virtual
from .row import IGNORED, Row, Sequences
from .state import Packed, Targets

if TYPE_CHECKING:
    from ..adapters import AdapterSet

MANY, TINY = 16, 24  # sequences, and their mean length in tokens, at which packing is weighed against padding


@dataclass(frozen=True, eq=False)
class SequenceAttention:
    """The attention of a packed row, in place of that of a base with these configurations."""

    segments: Segments
    configs: list[Any]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float, p: float = 0.0) -> Tensor:
        return self.segments.attend(q, k, v, layer, scale, p)

    def installed(self) -> AbstractContextManager:
        return packed_attention(self.configs)


class Packing:
    """Packs the batches of one wrapper."""

    def __init__(self, host: AdapterSet, facts: Facts) -> None:
        self.host, self.facts = host, facts
        self.configs = attention_configs(host.base)
        self.window = attention_window(host.base)
        self.slopes = alibi_slopes(host.base)
        self.shares_virtual = not has_dropout(host.base)

    def packs_on(self, device: torch.device, mixed: bool = False) -> bool:
        """Whether packed rows are tried on a device: on GPUs only where its flash kernel does all of their attention."""
        if device.type == "cpu":
            return True
        auto = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if auto else self.host._float_dtype()
        return not mixed and self.shares_virtual and self.slopes is None and varlen.takes(device, dtype)

    def lay(self, plan: Plan, named: dict) -> tuple[dict, Packed, Targets, Scope] | None:
        """All rows as one; None where these rows cannot be packed. It is laid out on the CPU."""
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
        inputs = self.packed_inputs(plan, named, found.kept, row)
        own = found.positions
        if self.facts.sums_up_mask and named.get("position_ids") is None:  # places that the mask leaves out have none
            own = torch.arange(len(own)) - found.starts.repeat_interleave(found.sizes)
        own = own + fronts.sum(0).repeat_interleave(found.sizes)
        positions = row.spread(own, [torch.arange(p, p + c) for c, p in zip(counts, prefixes, strict=True)])
        if self.facts.takes_positions:
            inputs["position_ids"] = positions[None].to(device)
        length = len(positions)
        filler = even_rows(length)  # a sequence of nothing
        inputs = {k: F.pad(v, (0, 0) * (v.dim() - 2) + (0, filler)) for k, v in inputs.items()}
        options: dict[str, Any] = {"use_cache": False} if self.facts.takes("use_cache") else {}
        options |= {"return_dict": named["return_dict"]} if named.get("return_dict") is not None else {}
        segments = Segments(row.pieces + [Piece(length, length + filler)] * (filler > 0), memories, self.slopes)
        routes = self.routes(plan, row, filler)
        places, targets = self.targets(named, found, row)
        most = 0 if drops_virtual(self.host, named) else max(counts)
        return (
            inputs | options,
            Packed(shape=tuple(named["labels"].shape), found=found, row=row, most=most),
            Targets(
                places=places.to(device), targets=targets.to(device), items=named.get("num_items_in_batch"),
                owners=row.owners[places],
            ),
            Scope(plan, routes, SequenceAttention(segments, self.configs)),
        )  # fmt: skip

    @staticmethod
    def routes(plan: Plan, row: Row, filler: int) -> Routes | None:
        """The routes of the packed row's tokens; its filling is of nobody."""
        if plan.routes is None:
            return None
        for i, draws in enumerate(plan.routes.draws or ()):
            draws.extra = even_rows(int((row.owners == i).sum()))
        return plan.routes.over(F.pad(row.owners, (0, filler), value=-1))

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

    @staticmethod
    def targets(named: dict, found: Sequences, row: Row) -> tuple[Tensor, Tensor]:
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
        by_layer: dict[str, Tensor] = {}
        if embeds is None:
            real = ids.flatten()[kept]  # type: ignore[union-attr]
            embeds = self.embedded(plan, real[None], row)[0]
            if (table := self.facts.per_layer) is not None:
                blank = [None if v is None else blank_ids(table, len(v)) for v in virtual]
                by_layer = per_layer_inputs(table, row.spread(real, blank)[None])
        else:
            embeds = embeds.flatten(0, 1)[kept]
        return {"inputs_embeds": row.spread(embeds, virtual)[None], **by_layer}

    def embedded(self, plan: Plan, ids: Tensor, row: Row) -> Tensor:
        """Embeddings [1, N, H] of the real tokens; the embedding layer may carry adapters."""
        routes = None if plan.routes is None else plan.routes.over(row.owners[row.tokens])
        with within(Scope(plan, routes)):
            return backbone_embeddings(self.host.base)(ids)
