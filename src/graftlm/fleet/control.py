"""How many replicas there are to be, and what is to be done for it: plain Python over a clock, no Ray.

    starting → ready → draining → gone        a member is of a generation: what it is made of

Where what replicas are made of has changed, those of the old generation go one by one, each when a new one is ready; where
there is no room for one more beside them, one of the old is drained first. New ones that do not start leave the old ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

STARTS = 3  # that may fail in a row before no more are tried
SEEN = 1.5  # seconds in which all ingresses hear that a replica drains


@dataclass(eq=False, kw_only=True)
class Member:
    """One replica, as its manager sees it."""

    name: str
    generation: int
    state: Literal["starting", "ready", "draining"] = "starting"
    requests: int = 0
    tokens: int = 0
    since: float = 0.0  # when it began to drain


@dataclass(frozen=True)
class Action:
    """What is to be done now: start a new one, drain this one, or stop it."""

    what: Literal["start", "drain", "stop"]
    name: str = ""


class Scaler:
    """How many replicas the tokens on their way need.

    Args:
        least, most: of them.
        tokens: on their way, that one replica is for.
        up, down: seconds for which more, or fewer, must have been needed.
    """

    def __init__(self, least: int, most: int, tokens: int, up: float, down: float) -> None:
        self.least, self.most, self.tokens, self.up, self.down = least, most, tokens, up, down
        self.count = least
        self._above: float | None = None
        self._below: float | None = None
        self._high = 0  # most that was needed since fewer are

    def wanted(self, now: float, tokens: int) -> int:
        """At this time, with so many tokens on their way."""
        needed = min(self.most, max(self.least, math.ceil(tokens / self.tokens)))
        if needed > self.count:
            self._below = None
            self._above = now if self._above is None else self._above
            if now - self._above >= self.up:
                self.count, self._above = needed, None
        elif needed < self.count:
            self._above = None
            if self._below is None:
                self._below, self._high = now, needed
            self._high = max(self._high, needed)
            if now - self._below >= self.down:
                self.count, self._below = self._high, None
        else:
            self._above = self._below = None
        return self.count


class Control:
    """What is to be done for a number of replicas of one generation.

    Attributes:
        failed: starts of this generation that failed, one after the other.
    """

    def __init__(self, grace: float = 60.0) -> None:
        self.members: dict[str, Member] = {}
        self.generation = 0
        self.grace = grace
        self.failed = 0

    def renew(self) -> None:
        """Replicas are made of something else from now on."""
        self.generation += 1
        self.failed = 0

    def decide(self, now: float, wanted: int, room: bool = True) -> list[Action]:
        """The next actions; they are carried out before this is asked again.

        Args:
            room: whether one more replica finds a place beside those that are there.
        """
        made = [Action("stop", m.name) for m in self._of("draining") if self._dry(m, now)]
        new, old = self._mine(), [m for m in self._of("ready", "starting") if m.generation != self.generation]
        made += [Action("stop", m.name) for m in old if m.state == "starting"]
        old = [m for m in old if m.state == "ready"]
        ready = [m for m in new if m.state == "ready"]
        missing = wanted - len(new)
        if missing > 0 and self.failed < STARTS:
            surge = 1 if old else 0  # one more than wanted while old ones are there
            free = wanted + surge - len(new) - len(old)
            if free > 0 and (room or not old):
                made += [Action("start")] * min(missing, free)
            elif free > 0 and len(ready) == len(new) and not self._of("draining"):  # one of the old makes room
                made.append(Action("drain", lightest(old).name))
        excess = len(ready) + len(old) - wanted
        if excess > 0 and old and not any(a.what == "drain" for a in made):
            made += [Action("drain", m.name) for m in sorted(old, key=load)[:excess]]
        elif len(new) > wanted:
            waiting = [m for m in new if m.state == "starting"]
            going = [*waiting, *sorted(ready, key=load)][: len(new) - wanted]
            made += [Action("stop" if m.state == "starting" else "drain", m.name) for m in going]
        return made

    def _dry(self, member: Member, now: float) -> bool:
        """Whether a draining member has nothing left, or had its time."""
        past = now - member.since
        return past >= self.grace or (past >= SEEN and not member.requests)

    def _of(self, *states: str) -> list[Member]:
        return [m for m in self.members.values() if m.state in states]

    def _mine(self) -> list[Member]:
        return [m for m in self._of("ready", "starting") if m.generation == self.generation]


def load(member: Member) -> tuple[int, int]:
    return member.tokens, member.requests


def lightest(members: Iterable[Member]) -> Member:
    return min(members, key=load)
