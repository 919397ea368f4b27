"""Which tokens go through the model in the next step: plain Python over token ids and places, no tensors.

    step     decoding rows, one token each  |  chunks of prompts, up to the budget
             a: y7   b: z4                  |  c: x64 … x127   d: x0 … x9

A step takes the next token of every row that decodes, and fills the rest of its token budget with prompts: a long prompt
comes in chunks and never holds decoding back by more than one of them. Whose prompts: deficit round robin (Shreedhar and
Varghese, 1995) over the compositions of adapters, by tokens. Where the cache is full the request that arrived last gives its
places up and is computed again later (preemption with recompute): the oldest one always goes on, so all come to an end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from .space import Extent, Space


@dataclass(eq=False, kw_only=True)
class Sequence:
    """One completion on its way.

    Args:
        tokens: ids of the prompt; what is written is appended.
        group: whose turn it is when it is its turn: its composition of adapters.
        front: places that stand in front of its tokens.
        deadline: when it is given up, by the clock that `schedule` is called with.

    Attributes:
        prompt: how many tokens are the prompt's.
        number: its place in the order of arrival.
        done: tokens whose keys and values are in the cache.
        cached: of the prompt's tokens those that were there before anything was computed; -1 until it joins.
        extent: its places in the cache; None while it waits.
        filling: there is more than its next token to be computed.
    """

    tokens: list[int]
    group: Hashable = ()
    front: int = 0
    deadline: float | None = None
    prompt: int = field(init=False)
    number: int = field(init=False, default=-1)
    done: int = field(init=False, default=0)
    cached: int = field(init=False, default=-1)
    extent: Extent | None = field(init=False, default=None)
    filling: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)

    @property
    def pending(self) -> int:
        """Tokens that have yet to go through the model."""
        return len(self.tokens) - self.done

    @property
    def places(self) -> int:
        """Places it takes once all of its tokens have."""
        return self.front + len(self.tokens)


@dataclass(frozen=True)
class Piece:
    """The next `count` tokens of a sequence."""

    sequence: Sequence
    count: int

    @property
    def completes(self) -> bool:
        """Whether the model says behind it what comes next."""
        return self.count == self.sequence.pending


@dataclass(frozen=True)
class Move:
    """`count` places of the cache to be copied."""

    source: int
    target: int
    count: int


@dataclass
class Step:
    """What is to be done, in this order.

    Args:
        moves: rows that outgrew their extents.
        joined: rows that begin: their front, and as many tokens as they have `done` already, go to their extents.
        pieces: what goes through the model; decoding rows first.
        preempted: rows that gave their places up, and wait again.
        expired: sequences whose deadline has passed, which are gone.
    """

    moves: list[Move] = field(default_factory=list)
    joined: list[Sequence] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    expired: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Sequences that wait and run.

    Args:
        space: the cache's places.
        max_rows: sequences that are in the cache at a time.
        step_tokens: tokens of a step, decoding rows included; a chunk has at least `least_chunk`, however many rows decode.
        quantum: tokens of prompts that a composition may have in one turn.
        known: how many of a sequence's first tokens need not be computed, at most all but one.
        chunk: tokens of prompts in a step in which so many rows decode, and so many others are in the cache or may come
            there; None: what is left of `step_tokens`.
    """

    def __init__(
        self,
        space: Space,
        max_rows: int = 16,
        step_tokens: int = 64,
        least_chunk: int = 16,
        quantum: int = 256,
        known: Callable[[Sequence], int] = lambda sequence: 0,
        chunk: Callable[[int, int], int] | None = None,
    ) -> None:
        self.space = space
        self.max_rows = max_rows
        self.step_tokens = step_tokens
        self.least_chunk = least_chunk
        self.quantum = quantum
        self.known = known
        self.chunk = chunk
        self.rows: list[Sequence] = []  # in the cache, in the order in which they joined
        self.turns: dict[Hashable, Turn] = {}  # compositions with something to prefill
        self.order: deque[Hashable] = deque()  # whose turn it is
        self._count = 0

    # -- sequences come and go -------------------------------------------------------------------------------------------
    def add(self, sequence: Sequence) -> None:
        """A sequence waits from now on. It must fit into the cache by itself, up to its last token."""
        sequence.number = self._count
        self._count += 1
        sequence.filling = True
        self._turn(sequence.group).waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """A sequence is done, or nobody wants it any more."""
        if sequence.extent is not None:
            self._free(sequence)
        self._leave_turn(sequence)

    def ran(self, pieces: list[Piece]) -> None:
        """These pieces have gone through the model."""
        for piece in pieces:
            piece.sequence.done += piece.count
            if not piece.sequence.pending:  # from here on it decodes
                self._leave_turn(piece.sequence)

    @property
    def waiting(self) -> list[Sequence]:
        """Those that are not in the cache."""
        return [s for turn in self.turns.values() for s in turn.waiting if s.extent is None]

    @property
    def busy(self) -> bool:
        return bool(self.rows or self.turns)

    # -- a step ----------------------------------------------------------------------------------------------------------
    def schedule(self, now: float = 0.0) -> Step:
        """What goes through the model next; `ran` says when it has."""
        step = Step()
        self._expire(step, now)
        for sequence in [s for s in self.rows if not s.filling]:
            if sequence.extent is not None and self._room(sequence, step):
                step.pieces.append(Piece(sequence, sequence.pending))
        gone = set(step.preempted)
        step.pieces = [piece for piece in step.pieces if piece.sequence not in gone]
        decoding = len(step.pieces)
        joining = min(len(self.rows) + len(self.waiting), self.max_rows) - decoding
        most = self.step_tokens - decoding if self.chunk is None else self.chunk(decoding, joining)
        self._prefill(step, max(self.least_chunk, most))
        return step

    def _expire(self, step: Step, now: float) -> None:
        everyone = [*self.rows, *self.waiting]
        step.expired = [s for s in everyone if s.deadline is not None and s.deadline <= now]
        for sequence in step.expired:
            self.remove(sequence)

    def _room(self, sequence: Sequence, step: Step) -> bool:
        """Make room for a row's next token. False where the row itself gives way, as the one that arrived last."""
        assert sequence.extent is not None
        while sequence.places > sequence.extent.size:
            before = sequence.extent
            larger = self.space.grow(before)
            if larger is not None:
                sequence.extent = larger
                if larger.start != before.start:
                    step.moves.append(Move(before.start, larger.start, sequence.front + sequence.done))
                continue
            last = max(self.rows, key=lambda s: s.number)
            self._preempt(last, step)
            if last is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence, step: Step) -> None:
        """A row gives its places up and waits, ahead of its composition's others that arrived later."""
        self._free(sequence)
        sequence.done = 0
        turn = self._turn(sequence.group)
        if not sequence.filling:
            sequence.filling = True
            behind = (i for i, other in enumerate(turn.waiting) if other.number > sequence.number)
            turn.waiting.insert(next(behind, len(turn.waiting)), sequence)
        step.preempted.append(sequence)

    def _prefill(self, step: Step, budget: int) -> None:
        """Chunks of prompts, by turns. Where the one whose turn it is does not fit, nobody new joins before it: small
        prompts would starve the large ones."""
        granted: dict[Sequence, int] = {}
        idle = 0
        while budget > 0 and idle < len(self.order):
            turn = self.turns[self.order[0]]
            if turn.credit <= 0:
                turn.credit += self.quantum
            given, stuck = self._serve(turn, min(budget, turn.credit), granted, step)
            turn.credit -= given
            budget -= given
            if stuck:
                for group in self.order:
                    budget -= self._serve(self.turns[group], budget, granted, None)[0]
                break
            idle = 0 if given else idle + 1
            if budget > 0 or turn.credit <= 0:
                self.order.rotate(-1)
        step.pieces += [Piece(sequence, count) for sequence, count in granted.items()]

    def _serve(self, turn: Turn, most: int, granted: dict[Sequence, int], step: Step | None) -> tuple[int, bool]:
        """Grant at most so many tokens of a composition's prompts; how many it were, and whether one waits for room.

        Args:
            step: that sequences may join; None: only those go on that are in the cache.
        """
        given = 0
        for sequence in turn.waiting:
            if given >= most:
                break
            if sequence.extent is None:
                if step is None:
                    continue
                if step.preempted or not self._join(sequence, step):
                    return given, True
            had = granted.get(sequence, 0)
            count = min(sequence.pending - had, most - given)
            if count:
                granted[sequence] = had + count
                given += count
        return given, False

    def _join(self, sequence: Sequence, step: Step) -> bool:
        """Give a sequence its places, if a row and an extent are free, and leave something to those that grow."""
        reserve = self.space.smallest * len(self.rows)
        wanted = self.space.fitting(sequence.places)
        if len(self.rows) >= self.max_rows or (self.rows and self.space.free < wanted + reserve):
            return False
        extent = self.space.take(sequence.places)
        if extent is None:
            return False
        sequence.extent = extent
        sequence.done = min(self.known(sequence), len(sequence.tokens) - 1)
        if sequence.cached < 0:
            sequence.cached = sequence.done
        self.rows.append(sequence)
        step.joined.append(sequence)
        return True

    # -- bookkeeping -----------------------------------------------------------------------------------------------------
    def _free(self, sequence: Sequence) -> None:
        assert sequence.extent is not None
        self.space.give(sequence.extent)
        sequence.extent = None
        self.rows.remove(sequence)

    def _turn(self, group: Hashable) -> Turn:
        if group not in self.turns:
            self.turns[group] = Turn()
            self.order.append(group)
        return self.turns[group]

    def _leave_turn(self, sequence: Sequence) -> None:
        """A sequence has no prompt to prefill any more. A composition without one has no turn, and saves nothing up."""
        if not sequence.filling:
            return
        sequence.filling = False
        waiting = self.turns[sequence.group].waiting
        waiting.remove(sequence)
        if not waiting:
            del self.turns[sequence.group]
            self.order.remove(sequence.group)


@dataclass(eq=False)
class Turn:
    """A composition's prompts, in the order of their arrival, and the tokens that it may still have in this turn."""

    waiting: deque[Sequence] = field(default_factory=deque)
    credit: int = 0
