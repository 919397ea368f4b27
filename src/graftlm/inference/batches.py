"""The engine for bases that cannot be stepped (Falcon, encoder-decoder models, positions that depend on the longest row):
batches through `generate`, one after the other.

    waiting   a b c d e …      the one that waits longest, and those that may go beside it
    generate  [a b c d]        a token of every row at a step, chosen as the other engine chooses it: each by its own request

A row's tokens are told as they come, and it may end, be cancelled or run out of time in the midst; its place stays empty
until the batch is over. What arrives meanwhile waits for the next one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ..architectures import is_encoder_decoder
from ..errors import AdapterError, ServingError, UnsupportedError
from ..mixing import try_mixed
from ..passes.facts import decoder_config
from ..passes.plain_cache import FrontMemory
from ..routing import BASE_NAME, Group
from .engine import Engine
from .jobs import Composition, Job
from .registry import Version, joint_digest
from .scheduler import Piece
from .scheduler import Sequence as Tokens
from .space import Space
from .stepping import Stepping

log = logging.getLogger("graftlm.serving")


class BatchEngine(Engine):
    """Serves requests in batches through `generate`; the same to its callers.

    Args:
        model, tokenizer, config, clock: as of an `Engine`. `cache_tokens` bounds a batch: its rows times the longest one.

    Raises:
        UnsupportedError: a base that does not generate.
    """

    def _parts(self, space: Space) -> tuple[Any, Stepping]:
        if not getattr(self.model.base, "can_generate", lambda: False)():
            raise UnsupportedError(f"{type(self.model.base).__name__} writes no text: a server needs a base that generates.")
        queue = Queue(space, self.config.max_rows)
        return queue, Batches(self, self.served, queue, self.starts, self.registry, self.tokenizer, self.limit)  # type: ignore[arg-type]

    def _limit(self, space: Space) -> int:
        """Positions that are scaled by the row's length ("dynamic") go beyond those that the base was trained on."""
        config = decoder_config(self.model.base)
        rope, own = getattr(config, "rope_parameters", None) or {}, getattr(config, "max_position_embeddings", None)
        if own is None or rope.get("rope_type") != "dynamic":
            return super()._limit(space)
        return min([space.largest, int(own * rope.get("factor", 1.0)), self.config.max_length or space.largest])

    def room(self, prompt: int, front: int = 0) -> int:
        """A decoder that reads its prompt through an encoder has all of its places for what it writes."""
        left = super().room(prompt, front)
        return left if not is_encoder_decoder(self.model.base) else self.limit if left >= 0 else 0


class Queue:
    """Completions in the order of their arrival: those in the batch, and those that wait for the next one."""

    def __init__(self, space: Space, max_rows: int) -> None:
        self.space = space
        self.max_rows = max_rows
        self.rows: list[Tokens] = []
        self.waiting: list[Tokens] = []

    def add(self, tokens: Tokens) -> None:
        self.waiting.append(tokens)

    def remove(self, tokens: Tokens) -> None:
        (self.rows if tokens in self.rows else self.waiting).remove(tokens)

    @property
    def busy(self) -> bool:
        return bool(self.rows or self.waiting)


class Batches(Stepping):
    """Steps that are batches."""

    scheduler: Queue  # type: ignore[assignment]
    owner: BatchEngine

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        served, base = self.served, self.served.host.base
        self.encodes = is_encoder_decoder(base)
        #: rows of one request at most, which have one length
        self.apart = served.longest_row_matters or (served.windows is None and not self.encodes)
        self.alike: dict[Group, bool] = {}  # whether a composition's rows equal themselves alone beside rows of others
        settings = getattr(base, "generation_config", None)
        self.last = getattr(settings, "forced_eos_token_id", None)
        self.last = self.last[-1] if isinstance(self.last, list) else self.last
        self.begins = getattr(settings, "decoder_start_token_id", None) or getattr(
            base.config, "decoder_start_token_id", None
        )

    def made(self, versions: tuple[Version, ...]) -> Composition:
        host, group = self.served.host, tuple(v.attached for v in versions)
        for version in versions:
            if host.methods[version.attached].tasks > 1:
                raise UnsupportedError(f"Adapter {version.name!r} has several tasks, between which no request chooses.")
            if not all(bool(torch.isfinite(p).all()) for _, p in host.adapter_parameters(version.attached)):
                raise AdapterError(
                    f"Under {version.name} the logits are no finite numbers. Train it anew, or load it again."
                )
        self.alike[group] = not self.apart and self._equal(group)
        return Composition(
            versions=versions, group=group, acting=group, digest=joint_digest(versions),
            front=FrontMemory([], sum(host.counts(group))),
        )  # fmt: skip

    def _equal(self, group: Group) -> bool:
        """Whether rows of these adapters and of the base, of any lengths, equal themselves alone: tried out, once a kind."""
        try:
            try_mixed(self.served.host, [group, ()])
        except UnsupportedError as why:
            log.warning("Requests of %s go one by one: %s", "+".join(group) or "the base", why)
            return False
        return True

    def fell(self, gone: Sequence[Composition]) -> None:
        for composition in gone:
            self.alike.pop(composition.group, None)

    def placed(self, job: Job) -> Composition:
        return self.composition(job.versions)  # `generate` looks for invocations itself

    def begin(self, job: Job) -> None:
        super().begin(job)
        self._add_later(job)  # each reads the prompt itself
        for writing in job.writings:
            seen = writing.chooser.seen
            if self.encodes and seen is not None:  # what a decoder has seen is what it wrote
                seen[:] = False
                seen[[] if self.begins is None else [self.begins]] = True

    def _keep(self, tokens: Tokens) -> None:
        """There are no shared starts here."""

    # -- a batch -----------------------------------------------------------------------------------------------------------
    def step(self, now: float) -> None:
        self._expire(now)
        rows = self._chosen()
        if rows:
            self._run(rows)

    def _expire(self, now: float) -> None:
        queue = self.scheduler
        for tokens in [t for t in (*queue.rows, *queue.waiting) if t.deadline is not None and t.deadline <= now]:
            if tokens in self.writings:
                queue.remove(tokens)
                self._expired(self.writings[tokens])

    def _chosen(self) -> list[Tokens]:
        """Who has waited longest, and who may go beside it."""
        queue, longest = self.scheduler, 0
        chosen: list[Tokens] = []
        for tokens in queue.waiting:
            longest_now = max(longest, tokens.places + self._most(tokens))
            full = len(chosen) == queue.max_rows or longest_now * (len(chosen) + 1) > queue.space.capacity
            if not chosen or (not full and self._together(chosen[0], tokens)):
                chosen.append(tokens)
                longest = longest_now
        return chosen

    def _most(self, tokens: Tokens) -> int:
        return self.writings[tokens].job.handle.request.params.max_new_tokens

    def _together(self, first: Tokens, other: Tokens) -> bool:
        jobs = [self.writings[tokens].job for tokens in (first, other)]
        groups = [self._group(tokens) for tokens in (first, other)]
        return jobs[0] is jobs[1] or all(self.alike[group] for group in groups)

    def _group(self, tokens: Tokens) -> Group:
        composition = self.writings[tokens].job.composition
        assert composition is not None
        return composition.group

    def _run(self, rows: list[Tokens]) -> None:
        """One batch, to its end. One that fails before it has written anything is tried again row by row."""
        queue = self.scheduler
        queue.waiting = [t for t in queue.waiting if t not in rows]
        queue.rows = list(rows)
        for tokens in rows:
            self.owner.started(self.writings[tokens].job)
        try:
            self._generate(rows)
            error: Exception | None = None
        except Exception as reason:
            log.exception("A batch of %d rows failed", len(rows))
            error = reason
        left = list(queue.rows)
        queue.rows = []
        queue.waiting[:0] = left
        if error is None or self.owner.stopping:  # whoever stops the engine tells them
            return
        fresh = [t for t in left if len(t.tokens) == t.prompt]
        for tokens in left:
            if tokens in self.writings and (len(rows) == 1 or tokens not in fresh):
                self._fail(self.writings[tokens], ServingError(f"A batch of the model failed: {error!r}"))
        for tokens in fresh if len(rows) > 1 else ():
            if tokens in self.writings:
                self._run([tokens])

    def _generate(self, rows: list[Tokens]) -> None:
        host: Any = self.served.host
        longest, device = max(len(t.tokens) for t in rows), host.adapter_device
        ids = torch.tensor([[0] * (longest - len(t.tokens)) + t.tokens for t in rows], device=device)
        mask = torch.tensor([[0] * (longest - len(t.tokens)) + [1] * len(t.tokens) for t in rows], device=device)
        writer = Writer(self, rows)
        host.generate(
            input_ids=ids, attention_mask=mask, adapter_names=[list(self._group(t)) or BASE_NAME for t in rows],
            max_new_tokens=max(self._most(t) for t in rows), do_sample=False, num_beams=1, repetition_penalty=1.0,
            eos_token_id=None, forced_eos_token_id=None, pad_token_id=0, logits_processor=LogitsProcessorList([writer]),
            stopping_criteria=StoppingCriteriaList([Ended(writer)]),
        )  # fmt: skip

    def write(self, rows: list[Tokens], logits: Tensor) -> Tensor:
        """A token for each row that still writes; logits [B, V] -> ids [B]."""
        self.owner.listen()
        self._expire(self.owner.clock())
        live = [(Piece(tokens, 1), row) for tokens, row in zip(rows, logits, strict=True) if tokens in self.writings]
        for piece, row in live:
            writing = self.writings[piece.sequence]
            if self.last is not None and writing.count == self._most(piece.sequence) - 1:
                row[torch.arange(len(row), device=row.device) != self.last] = -torch.inf
        self._write(live)
        ids = [tokens.tokens[-1] if len(tokens.tokens) > tokens.prompt else 0 for tokens in rows]
        return torch.tensor(ids, device=logits.device)


class Writer(LogitsProcessor):
    """Chooses the tokens of a batch, and leaves `generate` no other choice."""

    def __init__(self, batches: Batches, rows: list[Tokens]) -> None:
        self.batches = batches
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = self.batches.write(self.rows, scores)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


class Ended(StoppingCriteria):
    """Which rows of a batch have ended."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        batches = self.writer.batches
        over = [batches.owner.stopping or tokens not in batches.writings for tokens in self.writer.rows]
        return torch.tensor(over, device=input_ids.device)
