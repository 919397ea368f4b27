"""The engine's work on the model: compositions made ready, steps of rows, tokens chosen; all in the engine's thread."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..architectures import token_embeddings
from ..errors import RequestError, ServingError
from ..passes.served import Row, Served
from ..routing import Group
from .cache import KeyValueCache, Span
from .constraints import Constraint, Constraints
from .detokenize import Detokenizer
from .jobs import Composition, Job, Writing
from .pace import Pace
from .registry import Registry, Version, joint_digest
from .requests import Request, SamplingParams, TokenLogprob
from .sampling import Chooser, choose, logprob
from .scheduler import Piece, Scheduler, Step
from .scheduler import Sequence as Tokens
from .starts import Starts
from .text import end_tokens

log = logging.getLogger("graftlm.serving")
READY = 256  # compositions kept ready, and as many starts of detached ones: fronts take memory, and "a+b", "b+a" are two


class Owner(Protocol):
    """Who is told of requests."""

    def check_length(self, request: Request, front: int = 0) -> None:
        """It may be too long."""

    def started(self, job: Job) -> None:
        """It waits no more."""

    def settle(self, job: Job) -> None:
        """It is over."""

    def drop(self, job: Job, error: Exception) -> None:
        """It failed."""


class Stepping:
    """Steps of an engine.

    Args:
        owner: the engine.
        tokenizer: None for token ids only.
        limit: tokens that a row may have at most.
        pace: is told how long steps took; None: nobody asks.

    Attributes:
        vocabulary: ids that the model has rows for.
        writings: the completions on their way, by their tokens.
    """

    def __init__(
        self, owner: Owner, served: Served, scheduler: Scheduler, starts: Starts, registry: Registry, tokenizer: Any,
        limit: int, pace: Pace | None = None,
    ) -> None:  # fmt: skip
        self.owner = owner
        self.served = served
        self.scheduler = scheduler
        self.starts = starts
        self.registry = registry
        self.tokenizer = tokenizer
        self.limit = limit
        self.constraints = Constraints(tokenizer)
        self.cache = KeyValueCache(served, scheduler.space.capacity)
        self.compositions: OrderedDict[tuple[Version, ...], Composition] = OrderedDict()  # by their last use
        self.resting: OrderedDict[Hashable, Composition] = OrderedDict()  # of detached adapters, whose starts are kept
        self.writings: dict[Tokens, Writing] = {}
        self.vocabulary = token_embeddings(served.host.base).weight.shape[0]  # type: ignore[union-attr]
        first, others = end_tokens(tokenizer, served.host)
        self.ends = [*first, *others]
        self.pace = pace
        scheduler.known = self._known

    # -- compositions ----------------------------------------------------------------------------------------------------
    def composition(self, versions: tuple[Version, ...]) -> Composition:
        """Attached adapters together, ready for steps."""
        if versions not in self.compositions:
            self._let_go()
            made = self.compositions[versions] = self.made(versions)
            self.resting.pop(made.digest, None)
        self.compositions.move_to_end(versions)
        return self.compositions[versions]

    def made(self, versions: tuple[Version, ...]) -> Composition:
        """A composition, made ready."""
        group, host = tuple(v.attached for v in versions), self.served.host
        # soft prompts are in the cache once and for all; what else they may train acts on
        soft = {
            n for n in group
            if any(host.counts((n,))) and not getattr(host.methods[n].config, "modules_to_save", None)
        }  # fmt: skip
        digest = joint_digest(versions)
        self.starts.plant(digest, self.served.admit(group))
        acting = tuple(n for n in group if n not in soft)
        return Composition(versions=versions, group=group, acting=acting, digest=digest, front=self.starts.fronts[digest])

    def forget(self, version: Version) -> None:
        """An adapter was detached."""
        self.served.forget(version.attached)
        gone = [self.compositions.pop(versions) for versions in list(self.compositions) if version in versions]
        if not version.retired:  # it may come back to what is kept
            self.resting |= {c.digest: c for c in gone}
            gone = [self.resting.popitem(last=False)[1] for _ in range(len(self.resting) - READY)]
        self.fell(gone)

    def fell(self, gone: Sequence[Composition]) -> None:
        """Keep nothing of compositions any more but what others compute alike."""
        left = {c.digest for c in self.compositions.values()}
        for composition in gone:
            if composition.digest not in left:
                self.starts.fell(composition.digest)

    def _let_go(self) -> None:
        """Make room for one more: those go that were used longest ago and that no request goes through."""
        if len(self.compositions) < READY:
            return
        jobs = {writing.job for writing in self.writings.values()}
        used = {c.versions for job in jobs for c in (job.composition, *(job.invoked or ())[1:]) if c is not None}
        old = [versions for versions in self.compositions if versions and versions not in used]
        self.fell([self.compositions.pop(versions) for versions in old[: READY // 4]])

    # -- requests begin and end ------------------------------------------------------------------------------------------
    def begin(self, job: Job) -> None:
        """Let a request's first completion wait for its turn, the others for that one's prompt."""
        request = job.handle.request
        composition = self.placed(job)
        self.owner.check_length(request, composition.front.length)
        made = [self._writing(job, composition, index) for index in range(request.n)]
        job.composition = composition
        self.registry.take(job.versions)
        job.writings, job.later = made, made[1:]
        for writing in made:
            self.writings[writing.tokens] = writing
        self.scheduler.add(made[0].tokens)

    def placed(self, job: Job) -> Composition:
        """What a request's rows go through from their start on; and from its invocation on where an adapter waits for it."""
        calls = {v: call for v in job.versions if (call := self.served.host.methods[v.attached].invocation)}
        job.invoked = None
        for call in calls.values():
            whole, at = self.composition(job.versions), last_place(job.handle.request.prompt, call)
            job.invoked = None if at is None else (at, whole)
        return self.composition(tuple(v for v in job.versions if v not in calls))

    def ends_of(self, p: SamplingParams) -> list[int]:
        """Tokens that end a completion."""
        return [*([] if p.ignore_end else self.ends), *p.stop_ids]

    def constraints_of(self, request: Request) -> list[Constraint]:
        """What a request's form allows, for each of its completions; for any thread."""
        form = request.params.response_format
        if form is None or not request.params.formatted:
            return []
        return self.constraints.of(form, self.ends_of(request.params), request.n)

    def _writing(self, job: Job, composition: Composition, index: int) -> Writing:
        request = job.handle.request
        p = request.params
        ends = self.ends_of(p)
        constraint = job.constraints.pop() if p.formatted else None
        tokens = Tokens(
            tokens=list(request.prompt),
            group=joint_digest(job.versions),
            front=composition.front.length,
            deadline=job.deadline,
        )
        device = self.served.host.adapter_device
        chooser = Chooser(p, request.prompt, ends, p.seed + index, self.vocabulary, device, constraint)
        text = None if self.tokenizer is None else Detokenizer(self.tokenizer, p.stop)
        return Writing(job, index, tokens, chooser, ends, text)

    def end(self, writing: Writing, finish: str) -> None:
        """A completion ends before its time."""
        writing.end(finish)
        self.remove(writing)
        self._settled(writing.job)

    def remove(self, writing: Writing) -> None:
        """Take a completion out of the batch."""
        job = writing.job
        if writing in job.later:
            job.later.remove(writing)
        else:
            self.scheduler.remove(writing.tokens)
        self.writings.pop(writing.tokens, None)
        job.writings.remove(writing)

    def _settled(self, job: Job) -> None:
        if not job.writings:
            self.owner.settle(job)
        elif len(job.later) == len(job.writings):  # the one that the others waited for is gone
            self._add_later(job)

    def _add_later(self, job: Job) -> None:
        for writing in job.later:
            self.scheduler.add(writing.tokens)
        job.later = []

    # -- a step ----------------------------------------------------------------------------------------------------------
    def step(self, now: float) -> None:
        """The next step of whoever is in the batch. `now`: the time, for deadlines."""
        step = self.scheduler.schedule(now)
        for tokens in step.expired:
            self._expired(self.writings[tokens])
        self._carry_out(step)
        if not step.pieces:
            return
        # decoding rows whose extents lie side by side attend in one product
        pieces = sorted(step.pieces, key=lambda p: (p.count > 1, p.sequence.extent.start))  # type: ignore[union-attr]
        failed: dict[Piece, Exception] = {}
        begun = time.perf_counter()
        logits = self._forward(pieces, failed)
        prompts = sum(p.count for p in pieces if p.sequence.filling)
        if self.pace is not None:
            self.pace.took(sum(not p.sequence.filling for p in pieces), prompts, time.perf_counter() - begun)
        ran = [piece for piece in pieces if piece not in failed]
        completes = [piece.completes for piece in ran]
        self.scheduler.ran(ran)
        self._write([(p, row) for p, row, complete in zip(ran, logits, completes, strict=True) if complete])
        self._drop_broken([(p, row) for p, row, complete in zip(ran, logits, completes, strict=True) if not complete])
        for piece, error in failed.items():
            self._fail(self.writings[piece.sequence], ServingError(f"A step of the model failed: {error!r}"))

    def _expired(self, writing: Writing) -> None:
        writing.end("timeout")
        self.writings.pop(writing.tokens, None)
        writing.job.writings.remove(writing)
        for other in [w for w in writing.job.later if w in writing.job.writings]:
            self.end(other, "timeout")
        self._settled(writing.job)

    def _carry_out(self, step: Step) -> None:
        """What the scheduler decided about places."""
        for move in step.moves:
            self.cache.hold(move.target + move.count)
            self.cache.move(move.source, move.target, move.count)
        for tokens in step.joined:
            writing = self.writings[tokens]
            composition = writing.job.composition
            assert tokens.extent is not None and composition is not None
            self.cache.hold(tokens.extent.start + tokens.extent.size)
            at = self.cache.fill(tokens.extent.start, composition.front.memory)
            for memory, count in self.starts.find(composition.digest, tokens.tokens[: tokens.done]):
                at = self.cache.fill(at, memory, count)
            if writing.index == 0:
                writing.job.cached = max(writing.job.cached, tokens.cached)
            self.owner.started(writing.job)

    def _forward(self, pieces: list[Piece], failed: dict[Piece, Exception]) -> list[Tensor]:
        """Logits [V] behind each piece. Where a step fails its rows are tried one by one: what one of them writes to the
        cache again stands there already."""
        try:
            return list(self._logits(pieces))
        except Exception as error:
            log.exception("A step of %d rows failed", len(pieces))
            if len(pieces) == 1:
                failed[pieces[0]] = error
                return []
        made = []
        for piece in pieces:
            made += self._forward([piece], failed)
        return made

    def _logits(self, pieces: list[Piece]) -> Tensor:
        rows, spans, last = [], [], []
        for piece in pieces:
            tokens = piece.sequence
            assert tokens.extent is not None
            for group, at, count in self._parts(self.writings[tokens].job, tokens.done, piece.count):
                filled = tokens.front + at
                rows.append(Row(group, tokens.tokens[at : at + count], filled))
                spans.append(Span(tokens.extent, filled, count))
            last.append(len(rows) - 1)
        logits = self.served.step(rows, self.cache.over(spans))
        return logits if len(last) == len(rows) else logits[last]

    @staticmethod
    def _parts(job: Job, start: int, count: int) -> list[tuple[Group, int, int]]:
        """The adapters that act on `count` tokens of a row from `start` on: group, first token, tokens. Two where an
        invocation lies in their midst."""
        assert job.composition is not None
        if job.invoked is None:
            return [(job.composition.acting, start, count)]
        at, whole = job.invoked
        before = min(max(at - start, 0), count)
        parts = [(job.composition.acting, start, before), (whole.acting, start + before, count - before)]
        return [part for part in parts if part[2]]

    def _write(self, rows: list[tuple[Piece, Tensor]]) -> None:
        """Choose the next token of each row; logits [V] a row."""
        if not rows:
            return
        writings = [self.writings[piece.sequence] for piece, _ in rows]
        logits = torch.stack([row for _, row in rows])
        for writing, token, row in zip(writings, choose([w.chooser for w in writings], logits), logits, strict=True):
            tokens = writing.tokens
            if tokens not in self.writings:  # another completion of its request failed
                continue
            if token is None:
                self._fail(writing, _no_numbers(row))
                continue
            if len(tokens.tokens) == tokens.prompt:
                self._keep(tokens)
                self._add_later(writing.job)
            asked = writing.job.handle.request.params.logprobs
            probability: TokenLogprob | None = None if asked is None else logprob(row, token, asked)
            if writing.took(token, probability):
                self._keep(tokens)
                self.remove(writing)
                self._settled(writing.job)

    def _drop_broken(self, rows: list[tuple[Piece, Tensor]]) -> None:
        """Prompts in the midst of which numbers are no finite ones go at once, before others come to their places."""
        for piece, row in rows:
            if not bool(torch.isfinite(row.max())):
                self._fail(self.writings[piece.sequence], _no_numbers(row))

    def _fail(self, writing: Writing, error: Exception) -> None:
        """A request fails; its places are wiped, for nobody may read what is no number."""
        for other in writing.job.writings:
            if other.tokens.extent is not None:
                self.cache.clear(other.tokens.extent)
        self.owner.drop(writing.job, error)

    # -- shared starts ---------------------------------------------------------------------------------------------------
    def _known(self, tokens: Tokens) -> int:
        job = self.writings[tokens].job
        assert job.composition is not None
        return self.starts.known(job.composition.digest, tokens.tokens[:-1][: job.shared])

    def _keep(self, tokens: Tokens) -> None:
        """Keep a row's tokens for those that begin alike."""
        job = self.writings[tokens].job
        composition = job.composition
        assert composition is not None and tokens.extent is not None
        held = tokens.tokens[: tokens.done][: job.shared]
        new = self.starts.missing(composition.digest, held)
        if new:
            start = tokens.extent.start + tokens.front + len(held) - new
            self.starts.add(composition.digest, held, self.cache.read(start, new))


def last_place(tokens: Sequence[int], wanted: Sequence[int]) -> int | None:
    """Where a sequence of tokens stands for the last time; None where it does not."""
    size = len(wanted)
    places = (i for i in range(len(tokens) - size, -1, -1) if list(tokens[i : i + size]) == list(wanted))
    return next(places, None)


def _no_numbers(logits: Tensor) -> Exception:
    if bool(torch.isfinite(logits.max())):
        return RequestError("No token is allowed here by what the request asks for (logit_bias, penalties, a form).")
    return ServingError("The model's logits are no finite numbers under this adapter.")
