"""Which replica a request goes to: plain Python over names and counts; no tensors, no Ray. `benchmarks/fleet.py` runs the
same code over a clock.

    a request                 goes to
    adapters that are there   the holder that its start hashes to, or the least loaded one, of those not over their queue
    adapters that are not     one of the two that their names hash to, the less loaded; one with room for adapters first
    no adapter                where its start hashes to, unless that one is over its queue; else the less loaded of two

"Over its queue" bounds what hashing may do to one replica (consistent hashing with bounded loads: Mirrokni et al., 2018):
it has requests for half of its rows, and more tokens ahead of it than `SLACK` times the mean. Two: Mitzenmacher, 2001.
No group of adapters may fill the fleet: each has at most `SHARE` times the room that is free (Choudhury and Hahne, 1998), so
there is always room for one that comes new.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from ..errors import QueueFullError, ServingError
from .ring import Ring, spot

SLACK = 1.25  # times the mean load that a replica may have before others are asked
SHARE = 4.0  # times the free room that one composition of adapters may take
STALE = 8  # entries of the heap of loads for a replica, at most
NEAR = 8  # names on the ring that are looked at
POLICIES = ("affinity", "least", "random")

Fit = Callable[["Place"], bool]


class NoReplicaError(ServingError):
    """No replica takes requests now."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What the choice depends on.

    Args:
        adapters: names; none for the base.
        key: of a session, or of the prompt's start; None where there is nothing to share.
        tokens: of the prompt, and those that are written at most.
    """

    adapters: tuple[str, ...] = ()
    key: str | int | None = None
    tokens: int = 1

    @property
    def group(self) -> str:
        return "+".join(self.adapters)


@dataclass(eq=False, kw_only=True)
class Place:
    """A replica, as the router sees it.

    Args:
        rows: requests that it works on at a time.
        room: adapters that it holds at a time.
        most, most_tokens: requests, and their tokens, that it may have in all.

    Attributes:
        open: whether it takes requests.
        asked, tokens: requests that are there, and theirs.
        held: adapters that it holds or will, those used last at the end.
        going: of these, how many requests are there for each.
    """

    name: str
    rows: int = 16
    room: int = 8
    most: int = 256
    most_tokens: int = 1 << 20
    open: bool = True
    asked: int = field(init=False, default=0)
    tokens: int = field(init=False, default=0)
    held: dict[str, None] = field(init=False, default_factory=dict)
    going: Counter[str] = field(init=False, default_factory=Counter)

    @property
    def load(self) -> tuple[int, int]:
        """Tokens and requests ahead."""
        return self.tokens, self.asked

    def takes(self, tokens: int) -> bool:
        """Whether it has room for one more request."""
        return self.open and self.asked < self.most and (not self.asked or self.tokens + tokens <= self.most_tokens)


class Router:
    """Chooses replicas. Not thread-safe: its owner asks from one thread, or holds a lock.

    Args:
        policy: "affinity"; "least" (loaded) and "random" are what it is measured against.
    """

    def __init__(self, policy: str = "affinity", seed: int = 0) -> None:
        self.policy = policy
        self.places: dict[str, Place] = {}
        self.holders: dict[str, dict[str, Place]] = {}
        self.asked = self.tokens = 0
        self.by_group: Counter[str] = Counter()
        self._open: list[Place] = []
        self._spare: dict[str, Place] = {}  # with room for adapters
        self._room = 0
        self._ring = Ring()
        self._loads: list[tuple[int, int, str]] = []  # a heap of loads and names, those that were before among them
        self._draw = random.Random(seed)

    # -- replicas come and go ----------------------------------------------------------------------------------------------
    def update(self, places: Iterable[Place]) -> list[str]:
        """These are all there are; known ones keep what is counted, and take `open` and the limits. The names that went."""
        given = {place.name: place for place in places}
        gone = [name for name in self.places if name not in given]
        for name in gone:
            self._forget(name)
        for name, place in given.items():
            known = self.places.setdefault(name, place)
            known.open, known.rows, known.room = place.open, place.rows, place.room
            known.most, known.most_tokens = place.most, place.most_tokens
        self._count()
        return gone

    def lost(self, name: str) -> None:
        """A replica is no more."""
        if name in self.places:
            self._forget(name)
            self._count()

    def _forget(self, name: str) -> None:
        place = self.places.pop(name)
        for adapter in list(place.held):
            self._drop(place, adapter)
        self.asked -= place.asked
        self.tokens -= place.tokens

    def _count(self) -> None:
        before = {place.name for place in self._open}
        self._open = [place for place in self.places.values() if place.open]
        self._room = sum(place.most for place in self._open)
        self._spare = {place.name: place for place in self._open if len(place.held) < place.room}
        self._sort()
        if before != {place.name for place in self._open}:
            self._ring = Ring(place.name for place in self._open)

    def holds(self, name: str, adapters: Iterable[str]) -> None:
        """What a replica says it holds, used last at the end; what was sent there meanwhile counts, too."""
        place = self.places.get(name)
        if place is None:
            return
        told = dict.fromkeys(adapters)
        for adapter in [a for a in place.held if a not in told and a not in place.going]:
            self._drop(place, adapter)
        for adapter in told:
            self._hold(place, adapter)

    # -- requests ----------------------------------------------------------------------------------------------------------
    def choose(self, ask: Ask, avoid: Collection[str] = ()) -> str:
        """The replica for a request, which counts as there until it is `finished`.

        Args:
            avoid: replicas that it must not go to.

        Raises:
            NoReplicaError: there is none.
            QueueFullError: all have as much as they may, or its adapters' requests have.
        """
        if not any(place.name not in avoid for place in self._open):
            raise NoReplicaError("No replica is ready.")
        if self.by_group[ask.group] >= max(1.0, SHARE * (self._room - self.asked)):
            raise QueueFullError(
                f"{self.by_group[ask.group]} requests of {ask.group or 'the base'} are on their way, of {self.asked} "
                f"in all; the fleet has room for {self._room}, and one model may not fill it. Try again later."
            )

        def fit(place: Place) -> bool:
            return place.name not in avoid and place.takes(ask.tokens)

        found: Place | None = getattr(self, f"_{self.policy}")(ask, fit)
        if found is None:
            raise QueueFullError(
                f"{self.asked} requests with {self.tokens} tokens are on their way, as many as {len(self._open)} replicas "
                "take. Try again later."
            )
        found.asked += 1
        found.tokens += ask.tokens
        self.asked += 1
        self.tokens += ask.tokens
        self.by_group[ask.group] += 1
        self._note(found)
        for adapter in ask.adapters:
            found.going[adapter] += 1
            self._hold(found, adapter)
        return found.name

    def finished(self, name: str, ask: Ask) -> None:
        """A request has left the replica that was chosen for it."""
        self.by_group[ask.group] -= 1
        if not self.by_group[ask.group]:
            del self.by_group[ask.group]
        place = self.places.get(name)
        if place is None:  # `lost` has taken its part away
            return
        place.asked -= 1
        place.tokens -= ask.tokens
        self.asked -= 1
        self.tokens -= ask.tokens
        self._note(place)
        for adapter in ask.adapters:
            place.going[adapter] -= 1
            if not place.going[adapter]:
                del place.going[adapter]
        self._shrink(place)

    # -- choices -----------------------------------------------------------------------------------------------------------
    def _affinity(self, ask: Ask, fit: Fit) -> Place | None:
        holders = [place for place in self._holding(ask.adapters) if fit(place)]
        calm = [place for place in holders if not self._over(place)]
        if calm:
            return least(calm) if ask.key is None else hashed(ask.key, calm)
        key = ask.group or ask.key
        near = [] if key is None else [self.places[name] for name in self._ring.walk(key, NEAR)]
        near = [place for place in near if fit(place) and not self._over(place)]
        if ask.adapters:
            spare = [place for place in near if place.name in self._spare] or self._two(list(self._spare.values()), fit)
            near = [place for place in spare if not self._over(place)] or near
            if near:
                return least(near[:2])
        elif near:
            return near[0]
        return least(holders) if holders else self._of_two(fit)

    def _least(self, ask: Ask, fit: Fit) -> Place | None:
        while (found := self.places[self._loads[0][2]]).load != self._loads[0][:2] or not found.open:
            heappop(self._loads)
        return found if fit(found) else least([place for place in self._open if fit(place)])

    def _note(self, place: Place) -> None:
        """A load has changed."""
        if self.policy == "least" and place.open:
            heappush(self._loads, (*place.load, place.name))
            if len(self._loads) > STALE * len(self._open):
                self._sort()

    def _sort(self) -> None:
        """The heap without loads that were before."""
        self._loads = [(*place.load, place.name) for place in self._open]
        heapify(self._loads)

    def _random(self, ask: Ask, fit: Fit) -> Place | None:
        found = self._draw.choice(self._open)
        if fit(found):
            return found
        others = [place for place in self._open if fit(place)]
        return self._draw.choice(others) if others else None

    def _of_two(self, fit: Fit) -> Place | None:
        return least(self._two(self._open, fit)) or least([place for place in self._open if fit(place)])

    def _two(self, places: list[Place], fit: Fit) -> list[Place]:
        """At most two of these, drawn."""
        drawn = places if len(places) <= 2 else self._draw.sample(places, 2)
        return [place for place in drawn if fit(place)]

    def _over(self, place: Place) -> bool:
        """Whether what comes new would go slower there than elsewhere."""
        return 2 * place.asked >= place.rows and place.tokens > SLACK * self.tokens / len(self._open)

    # -- who holds what ----------------------------------------------------------------------------------------------------
    def _holding(self, adapters: tuple[str, ...]) -> list[Place]:
        if not adapters:
            return []
        first, *others = sorted((self.holders.get(a, {}) for a in adapters), key=len)
        return [place for name, place in first.items() if all(name in other for other in others)]

    def _hold(self, place: Place, adapter: str) -> None:
        place.held.pop(adapter, None)
        place.held[adapter] = None
        self.holders.setdefault(adapter, {})[place.name] = place
        self._shrink(place)
        if len(place.held) >= place.room:
            self._spare.pop(place.name, None)

    def _shrink(self, place: Place) -> None:
        """What the replica puts out to make room: what was used longest ago and is not in use."""
        idle = (a for a in list(place.held) if a not in place.going)
        while len(place.held) > place.room and (oldest := next(idle, None)) is not None:
            self._drop(place, oldest)

    def _drop(self, place: Place, adapter: str) -> None:
        del place.held[adapter]
        del self.holders[adapter][place.name]
        if not self.holders[adapter]:
            del self.holders[adapter]
        if place.open and len(place.held) < place.room and place.name in self.places:
            self._spare[place.name] = place


def least(places: list[Place]) -> Place | None:
    """The one with the fewest tokens ahead; None of none."""
    return min(places, key=lambda place: place.load, default=None)


def hashed(key: str | int, places: list[Place]) -> Place:
    """The one that a key belongs to, of a few (rendezvous hashing: Thaler and Ravishankar, 1998)."""
    return max(places, key=lambda place: spot(f"{key} {place.name}"))
