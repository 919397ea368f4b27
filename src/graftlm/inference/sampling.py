"""The next token of each row, by its own request: what others in the batch ask for does not come into it.

Shapes: R rows, V vocabulary.

As in transformers' `generate`: the same processors in the same order on logits in fp32, and the same draw, so that a request
with a seed gets what `torch.manual_seed(seed)` and `generate` give it alone. Each has a generator of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UnsupportedError
from .constraints import Constraint
from .requests import SamplingParams, TokenLogprob

log = logging.getLogger("graftlm.serving")


class Chooser:
    """Chooses one completion's tokens.

    Args:
        prompt: ids, which the repetition penalty counts as well.
        ends: tokens that end the completion.
        seed: of its random numbers.
        constraint: which tokens its form allows.
    """

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], ends: Sequence[int], seed: int, vocabulary: int,
        device: torch.device, constraint: Constraint | None = None,
    ) -> None:  # fmt: skip
        self.params = params
        self.ends = torch.tensor(sorted(ends), dtype=torch.long, device=device)
        self.constraint = constraint
        self.count = 0  # tokens chosen
        self.generator = torch.Generator(device).manual_seed(seed) if params.temperature > 0 else None
        self.bias = self.seen = self.counts = None
        if params.logit_bias:
            at, values = (list(side) for side in zip(*params.logit_bias.items(), strict=True))
            self.bias = torch.tensor(at, device=device), torch.tensor(values, device=device)
        if params.repetition_penalty != 1:
            self.seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)
            self.seen[torch.tensor(prompt, device=device)] = True
        if params.presence_penalty or params.frequency_penalty:
            self.counts = torch.zeros(vocabulary, device=device)

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is taken, of the logits as they are."""
        return self.generator is None and not self._processes

    @property
    def _processes(self) -> bool:
        changed = self.bias is not None or self.seen is not None or self.counts is not None or self.constraint is not None
        return changed or self.count < self.params.min_new_tokens

    def scores(self, logits: Tensor) -> Tensor:
        """logits [V] in fp32 -> the logits of the distribution that is drawn from; the given ones stay as they are."""
        p = self.params
        if self._processes:
            logits = logits.clone()
        if self.bias is not None:
            logits.index_add_(0, self.bias[0], self.bias[1].to(logits.dtype))
        if self.seen is not None:
            r = p.repetition_penalty
            logits = torch.where(self.seen, torch.where(logits < 0, logits * r, logits / r), logits)
        if self.counts is not None:
            logits -= self.counts * p.frequency_penalty + (self.counts > 0) * p.presence_penalty
        if self.count < p.min_new_tokens:
            logits[self.ends] = -torch.inf
        if self.constraint is not None:
            self.constraint.mask(logits)
        return logits if self.generator is None else warped(logits, p)

    def took(self, token: int) -> None:
        """A token was chosen."""
        self.count += 1
        if self.seen is not None:
            self.seen[token] = True
        if self.counts is not None:
            self.counts[token] += 1
        if self.constraint is not None:
            self.constraint.took(token)


def warped(logits: Tensor, p: SamplingParams) -> Tensor:
    """Temperature, top-k, top-p and min-p on logits [V], one after the other, as transformers' warpers."""
    if p.temperature != 1:
        logits = logits / p.temperature
    if p.top_k:
        least = logits.topk(min(p.top_k, logits.shape[-1])).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if p.top_p < 1:
        values, order = logits.sort()
        beyond = values.softmax(-1).cumsum(-1) <= 1 - p.top_p
        beyond[-1] = False
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter_(0, order, beyond), -torch.inf)
    if p.min_p:
        shares = logits.softmax(-1)
        logits = logits.masked_fill(shares < p.min_p * shares.max(), -torch.inf)
    return logits


def choose(choosers: Sequence[Chooser], logits: Tensor) -> list[int | None]:
    """The next token of each row; logits [R, V]. None where a row's logits are no finite numbers, or its form ends it."""
    highest, best = likeliest(logits)
    finite, chosen = torch.isfinite(highest).tolist(), best.tolist()
    for i, chooser in enumerate(choosers):
        if not finite[i]:
            chosen[i] = None
            continue
        try:
            if not chooser.plain:
                chosen[i] = draw(chooser, logits[i].float())
            if chosen[i] is not None:
                chooser.took(chosen[i])
        except UnsupportedError as error:  # a form that grew over its library's limits is its own request's matter
            log.warning("A completion ends: %s", error)
            chosen[i] = None
    return chosen


_WIDTH = 256


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The highest logit [R] of each row and where it stands first; logits [R, V]. On a CPU torch's own takes twenty times
    as long as a maximum alone: so first the maximum of each stretch of the vocabulary, then its place in one of them."""
    size = logits.shape[1]
    count = size // _WIDTH
    if logits.device.type != "cpu" or count < 8:
        return logits.max(dim=-1)  # type: ignore[return-value]
    stretches = logits[:, : count * _WIDTH].unflatten(1, (count, _WIDTH)).amax(-1)
    if size % _WIDTH:
        stretches = torch.cat((stretches, logits[:, count * _WIDTH :].amax(-1, keepdim=True)), dim=1)
    highest, stretch = stretches.max(dim=-1)
    start = (stretch * _WIDTH).clamp_(max=size - _WIDTH)
    own = logits.gather(1, start[:, None] + torch.arange(_WIDTH))
    return highest, start + own.argmax(-1)


def draw(chooser: Chooser, logits: Tensor) -> int | None:
    """One row's token; logits [V] in fp32."""
    scores = chooser.scores(logits)
    if not bool(torch.isfinite(scores.max())):  # nothing is allowed
        return None
    if chooser.generator is None:
        return int(scores.argmax())
    return int(torch.multinomial(scores.softmax(-1), 1, generator=chooser.generator))


def logprob(logits: Tensor, token: int, most: int) -> TokenLogprob:
    """A token's log probability and the `most` highest, of logits [V]."""
    values = logits.float().log_softmax(-1)
    top = values.topk(min(most, len(values))) if most else None
    likeliest = {} if top is None else dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return TokenLogprob(token=token, logprob=float(values[token]), top=likeliest)
