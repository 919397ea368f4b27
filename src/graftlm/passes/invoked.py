"""Adapters that wait for their invocation (aLoRA, https://arxiv.org/abs/2504.12397): from which token of a row on they act.

Shapes: B rows, T tokens of this pass, P virtual tokens.

    tokens   x0 x1 x2 <inv0> <inv1> x5 x6     the adapter acts on <inv0> and all behind it, computed token by token;
             ------- base --|------ adapter   what is before it has the base's keys and values, which can be shared

Rows in which the sequence does not stand are the base's. Of `inputs_embeds` those are tokens that equal the base's own
embeddings. Of several invocations in a row the last one counts; of a
`generate` that of the prompt. A pass over a filled cache goes on as the rows in the cache ended.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache

from ..architectures import backbone_embeddings
from ..routing import Plan, Routes
from .inputs import tokens_of
from .refusals import held
from .state import Packed, Placed, Run, Step

if TYPE_CHECKING:
    from ..adapters import AdapterSet


def waits(host: AdapterSet, plan: Plan, layer: Any = None) -> bool:
    """Whether an adapter of this plan waits for its invocation (and changes a layer, where one is given)."""
    found = [name for own, group in host.owners(plan) for name in group if own.methods[name].invocation]
    while layer is not None and found and hasattr(layer, "base_layer"):
        if any(name in getattr(layer, "changes", ()) for name in found):
            return True
        layer = layer.base_layer
    return bool(found) and layer is None


@dataclass(frozen=True)
class Invocations:
    """Where waiting adapters act in a pass.

    Args:
        host, plan: the pass's.
        acts: by the place of the owner in `host.owners(plan)` and the adapter, where it acts [B, T]; rows of others are
            never asked for.
    """

    host: AdapterSet
    plan: Plan
    acts: dict[tuple[int, str], Tensor]

    @classmethod
    def of(cls, host: AdapterSet, plan: Plan, run: Run, named: dict) -> Invocations | None:
        """Of a call of the base; None where no adapter waits."""
        if not waits(host, plan):
            return None
        given, cache = tokens_of(named), named.get("past_key_values")
        rows, length = given.shape[:2]
        filled = isinstance(cache, Cache) and bool(cache.get_seq_length())
        past = held(cache, *host.fronts(plan, rows)) if filled else 0  # type: ignore[arg-type]
        ids = (
            run.prompt.to(given.device) if run.prompt is not None else given if given.dim() == 2 else read(host, plan, given)
        )
        ids = ids.repeat_interleave(rows // ids.shape[0], 0)
        if run.prompt is None or run.first is None:
            run.first = past + length - ids.shape[1]
        pieces = sequences(named) if run.prompt is None and not past else None
        before = getattr(cache, "invoked", {}) if filled else {}
        acts = {}
        for i, (own, group) in enumerate(host.owners(plan)):
            for name in group:
                if tokens := own.methods[name].invocation:
                    found = acting(ids, tokens, pieces, length, past - run.first)
                    if (ended := before.get(name)) is not None and (run.prompt is None or run.first):
                        found = found | ended.to(found.device)[:, None]
                    acts[i, name] = found
        run.invoked = {name: found[:, -1] for (_, name), found in acts.items()}
        return cls(host, plan, acts)

    def routes(self, layout: Placed | Packed | Step) -> Routes | None:
        """The routes of the pass's tokens [B, T] or [B, P + T], as they are laid out; None where all act everywhere."""
        names = sorted({name for _, name in self.acts})
        shape = next(iter(self.acts.values())).shape
        device = next(iter(self.acts.values())).device
        base, rows = self.plan.routes, torch.zeros(shape[0], dtype=torch.long, device=device)
        owner = rows if base is None else base.each(shape[0], device)
        code = torch.zeros(shape, dtype=torch.long, device=device)
        for (i, name), found in self.acts.items():
            code += (found & (owner == i)[:, None]).long() << names.index(name)
        order = layout.order if isinstance(layout, Placed) else None
        if order is not None:  # virtual tokens come before every invocation
            code = torch.cat((code.new_zeros(shape[0], order.shape[1] - shape[1]), code), dim=1).gather(1, order)
        code = code + (owner << len(names))[:, None]
        kinds, of = code.unique(return_inverse=True)
        owners, groups, origin = self.host.owners(self.plan), [], []
        for kind in kinds.tolist():
            i, bits = kind >> len(names), kind
            _, group = owners[i]
            groups.append(tuple(n for n in group if (i, n) not in self.acts or bits >> names.index(n) & 1))
            origin.append(i)
        if base is None and groups == [self.plan.adapters]:
            return None
        if torch.is_grad_enabled():  # whom nobody has invoked gets gradients of zero, for which no token goes through it
            present = {(i, name) for i, group in zip(origin, groups, strict=True) for name in group}
            idle = [i for i, (_, group) in enumerate(owners) if {(i, n) for n in group} & self.acts.keys() - present]
            groups += [owners[i][1] for i in idle]
            origin += idle
        switches = None if base is None or base.switches is None else [base.switches[i] for i in origin]
        draws = None if base is None or base.draws is None else [base.draws[i] for i in origin]
        return Routes(groups, of.cpu(), switches=switches, draws=draws)


def read(host: AdapterSet, plan: Plan, embeds: Tensor) -> Tensor:
    """Token ids [B, T] of embeddings [B, T, H], as far as they are of invocations; -1 for others."""
    groups = host.owners(plan)
    wanted = sorted({t for own, group in groups for name in group for t in own.methods[name].invocation or ()})
    embeddings = backbone_embeddings(host.base)
    wanted = [token for token in wanted if token < embeddings.weight.shape[0]]
    with host.without_adapters():
        known = embeddings(torch.tensor(wanted, dtype=torch.long, device=embeds.device))
    ids = torch.full(embeds.shape[:2], -1, device=embeds.device)
    for token, vector in zip(wanted, known.to(embeds.dtype), strict=True):
        ids[(embeds == vector).all(-1)] = token
    if not (ids >= 0).any():
        warnings.warn(
            "alora_invocation_tokens: none of inputs_embeds is the base's embedding of one of these tokens, so all of it is "
            "the base's. Pass input_ids, or embeddings as model.get_input_embeddings() gives them.",
            stacklevel=2,
        )
    return ids


def sequences(named: dict) -> Tensor | None:
    """The number of each token's sequence [B, T] where a row holds several: positions that start again, without a mask."""
    positions, shape = named.get("position_ids"), tokens_of(named).shape[:2]
    if positions is None or named.get("attention_mask") is not None or positions.dim() != 2:
        return None
    starts = torch.diff(positions.expand(shape), dim=1, prepend=positions.expand(shape)[:, :1] - 1) != 1
    return starts.long().cumsum(1)


def acting(ids: Tensor, tokens: list[int], pieces: Tensor | None, length: int, skip: int) -> Tensor:
    """Where an adapter acts [B, length].

    Args:
        ids: of the rows as far as they are known [B, N].
        pieces: the number of each token's sequence [B, N]; None: a row is one.
        length, skip: of the pass, which begins `skip` places behind the first of `ids` (and may end behind the last).
    """
    size = len(tokens)
    pieces = torch.zeros_like(ids) if pieces is None else pieces
    last = torch.full((ids.shape[0], int(pieces.max()) + 1 if pieces.numel() else 1), -1, device=ids.device)
    if ids.shape[1] >= size:
        wanted = torch.tensor(tokens, device=ids.device)
        here = (ids.unfold(1, size, 1) == wanted).all(-1) & (pieces[:, : 1 - size or None] == pieces[:, size - 1 :])
        places = torch.where(here, torch.arange(here.shape[1], device=ids.device), -1)
        last = last.scatter_reduce(1, pieces[:, : here.shape[1]], places, "amax")
    at = torch.arange(skip, skip + length, device=ids.device).expand(ids.shape[0], -1)
    own = pieces[:, skip : skip + length] if pieces.shape[1] == skip + length else pieces[:, -1:].expand(-1, length)
    start = last.gather(1, own)
    return (start >= 0) & (at >= start)
