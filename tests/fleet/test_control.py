"""How many replicas there are, and which go: over a clock, without Ray."""

from __future__ import annotations

import random

import pytest

from graftlm.fleet.control import SEEN, STARTS, Action, Control, Member, Scaler


class World:
    """Carries actions out: a start takes five seconds, drained replicas finish a request in three."""

    def __init__(self, control: Control, places: int) -> None:
        self.control, self.places, self.now, self.number = control, places, 0.0, 0
        self.begun: dict[str, float] = {}
        self.broken = False
        self.served: list[int] = []  # replicas that take requests, second by second

    def second(self, wanted: int) -> list[Action]:
        made = self.control.decide(self.now, wanted, room=len(self.control.members) < self.places)
        for action in made:
            if action.what == "start" and len(self.control.members) < self.places:
                self.number += 1
                name = f"r{self.number}"
                self.control.members[name] = Member(name=name, generation=self.control.generation)
                self.begun[name] = self.now
            elif action.what == "drain":
                member = self.control.members[action.name]
                assert member.state == "ready"
                member.state, member.since = "draining", self.now
            elif action.what == "stop":
                member = self.control.members.pop(action.name)
                assert member.state != "ready"
        self.now += 1
        for member in list(self.control.members.values()):
            if member.state == "starting" and self.now - self.begun[member.name] >= 5:
                if self.broken:
                    del self.control.members[member.name]
                    self.control.failed += 1
                else:
                    member.state = "ready"
            member.requests = int(member.state == "ready" or self.now - member.since < 3)
        self.served.append(sum(m.state == "ready" for m in self.control.members.values()))
        return made


def generations(control: Control) -> list[int]:
    return [m.generation for m in control.members.values() if m.state == "ready"]


def test_as_many_as_wanted_are_started_and_let_go() -> None:
    world = World(Control(), places=10)
    for _ in range(8):
        world.second(3)
    assert world.served[-1] == 3 and world.number == 3
    del world.control.members["r1"]  # it died
    for _ in range(8):
        world.second(3)
    assert world.served[-1] == 3
    for _ in range(12):
        world.second(1)
    assert world.served[-1] == len(world.control.members) == 1


@pytest.mark.parametrize("places", [4, 3])
def test_a_new_generation_comes_in_one_by_one(places: int) -> None:
    """With room for one more there are never fewer than wanted; without, never fewer by more than one."""
    world = World(Control(), places)
    for _ in range(8):
        world.second(3)
    world.control.renew()
    start = len(world.served)
    for _ in range(60):
        world.second(3)
        assert len(world.control.members) <= places
    assert generations(world.control) == [1, 1, 1] and len(world.control.members) == 3
    assert min(world.served[start:]) == (3 if places == 4 else 2)


def test_one_replica_alone_is_renewed_where_there_is_room_for_no_other() -> None:
    world = World(Control(), places=1)
    for _ in range(8):
        world.second(1)
    world.control.renew()
    for _ in range(20):
        world.second(1)
    assert generations(world.control) == [1] and world.number == 2


def test_new_ones_that_do_not_start_leave_the_old_in_place() -> None:
    world = World(Control(), places=4)
    for _ in range(8):
        world.second(3)
    world.control.renew()
    world.broken = True
    for _ in range(60):
        world.second(3)
    assert generations(world.control) == [0, 0, 0] and world.number == 3 + STARTS
    world.control.renew()
    world.broken = False
    for _ in range(60):
        world.second(3)
    assert generations(world.control) == [2, 2, 2]


def test_a_replica_drains_until_all_have_heard_and_nothing_runs_but_not_for_ever() -> None:
    control = Control(grace=10)
    control.members["a"] = Member(name="a", generation=0, state="draining", since=0.0)
    assert control.decide(SEEN / 2, 0) == []
    assert control.decide(SEEN, 0) == [Action("stop", "a")]
    control.members["a"].requests = 1
    assert control.decide(9.9, 0) == [] and control.decide(10, 0) == [Action("stop", "a")]


@pytest.mark.parametrize("seed", range(5))
def test_whatever_happens_it_comes_to_rest(seed: int) -> None:
    rng = random.Random(seed)
    world = World(Control(grace=8), places=rng.randint(1, 6))
    wanted = 1
    for _ in range(200):
        what = rng.random()
        if what < 0.05:
            wanted = rng.randint(1, world.places)
        elif what < 0.08:
            world.control.renew()
        elif what < 0.15 and world.control.members:
            del world.control.members[rng.choice(list(world.control.members))]
        world.second(wanted)
    for _ in range(30 * world.places):
        world.second(wanted)
    assert generations(world.control) == [world.control.generation] * wanted
    assert len(world.control.members) == wanted and world.second(wanted) == []


def test_the_number_follows_the_tokens() -> None:
    scaler = Scaler(1, 4, tokens=100, up=3, down=10)
    assert [scaler.wanted(t, 250) for t in range(5)] == [1, 1, 1, 3, 3]
    assert scaler.wanted(5, 10_000) == 3 and scaler.wanted(9, 10_000) == 4  # no more than there may be
    assert [scaler.wanted(10 + t, 0) for t in range(10)] == [4] * 10
    assert scaler.wanted(20, 0) == 1


def test_a_short_peak_or_lull_changes_nothing() -> None:
    scaler = Scaler(1, 4, tokens=100, up=3, down=10)
    assert [scaler.wanted(t, 1000 if t % 2 else 0) for t in range(20)] == [1] * 20
    for t in range(20, 24):
        scaler.wanted(t, 1000)
    assert [scaler.wanted(24 + t, 1000 if t == 5 else 0) for t in range(15)] == [4] * 15
    for t in range(39, 41):
        assert scaler.wanted(t, 150) in (2, 4)
    assert scaler.count == 2  # the most that was needed in the lull


def test_a_fixed_number_is_fixed() -> None:
    scaler = Scaler(2, 2, tokens=1, up=0, down=0)
    assert [scaler.wanted(t, 10**6 * (t % 2)) for t in range(5)] == [2] * 5
