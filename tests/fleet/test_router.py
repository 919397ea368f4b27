"""The router: who gets a request, who may not fill the fleet, and what is left of a replica that is gone."""

from __future__ import annotations

import contextlib
import random
from collections import Counter

import pytest

from graftlm.errors import QueueFullError
from graftlm.fleet.ring import Ring
from graftlm.fleet.router import SHARE, SLACK, Ask, NoReplicaError, Place, Router


def router(count: int = 4, policy: str = "affinity", **limits: int) -> Router:
    made = Router(policy)
    made.update(Place(name=f"r{i}", **limits) for i in range(count))
    return made


def passed(made: Router, ask: Ask) -> str:
    """Where a request went that is done already."""
    name = made.choose(ask)
    made.finished(name, ask)
    return name


def consistent(made: Router, sent: list[tuple[str, Ask]]) -> None:
    """What the router counts is what was sent; its two indexes say the same."""
    for name, place in made.places.items():
        here = [ask for where, ask in sent if where == name]
        assert (place.asked, place.tokens) == (len(here), sum(ask.tokens for ask in here))
        assert place.going == Counter(a for ask in here for a in ask.adapters)
        assert len(place.held) <= max(place.room, len(place.going)) and set(place.going) <= set(place.held)
        assert (name in made._spare) == (place.open and len(place.held) < place.room)
    held = {(a, name) for name, place in made.places.items() for a in place.held}
    assert held == {(a, name) for a, there in made.holders.items() for name in there}
    alive = [ask for where, ask in sent if where in made.places]
    assert (made.asked, made.tokens) == (len(alive), sum(ask.tokens for ask in alive))
    assert made.by_group == Counter(ask.group for _, ask in sent)


def test_an_adapter_stays_where_it_is() -> None:
    made = router()
    where = {a: made.choose(Ask(adapters=(a,))) for a in ("a", "b", "c", "d")}
    for _ in range(8):
        for adapter, name in where.items():
            assert made.choose(Ask(adapters=(adapter,))) == name


def test_two_routers_that_know_nothing_of_each_other_choose_the_same() -> None:
    """Of many adapters that are nowhere yet: they are hashed, not drawn."""
    asks = [Ask(adapters=(f"a{i}",)) for i in range(30)]
    one, other = router(5, room=100), router(5, room=100)
    assert [one.choose(a) for a in asks] == [other.choose(a) for a in asks]
    held = Counter(name for places in one.holders.values() for name in places)
    assert max(held.values()) <= 10, held  # of two that hashing names, the less loaded


def test_over_its_queue_an_adapter_goes_to_a_second_replica_too() -> None:
    made = router(4, rows=2, most=64)
    for i in range(8):
        made.choose(Ask(tokens=10, adapters=(f"other{i}",)))
    names = [made.choose(Ask(adapters=("hot",), tokens=10)) for _ in range(12)]
    assert len(set(names)) > 1 and len(set(names[:1])) == 1
    loads = [place.tokens for place in made.places.values()]
    assert max(loads) <= SLACK * sum(loads) / 4 + 20  # one more request than the bound, at most


def test_room_for_adapters_is_used_before_one_is_put_out() -> None:
    made = router(8, room=8)
    for i in range(64):
        ask = Ask(adapters=(f"a{i}",))
        made.finished(made.choose(ask), ask)
    assert len(made.holders) == 64 and all(len(place.held) == 8 for place in made.places.values())
    asked = [Ask(adapters=(f"a{i}",)) for i in random.Random(0).choices(range(64), k=500)]
    for ask in asked:
        before = set(made.holders[ask.adapters[0]])
        name = made.choose(ask)
        made.finished(name, ask)
        assert name in before


def test_compositions_need_all_of_their_adapters() -> None:
    made = router(3)
    made.holds("r0", ["a"])
    made.holds("r1", ["b", "a"])
    made.holds("r2", ["b"])
    assert made.choose(Ask(adapters=("a", "b"))) == "r1"


def test_the_same_start_goes_to_the_same_replica_and_moves_little() -> None:
    made = router(5, rows=100)
    first = {key: passed(made, Ask(key=key)) for key in range(200)}
    assert {key: passed(made, Ask(key=key)) for key in range(200)} == first
    assert len(set(first.values())) == 5
    made.update([Place(name=f"r{i}", rows=100) for i in range(6)])
    moved = [key for key in range(200) if passed(made, Ask(key=key)) != first[key]]
    assert len(moved) < 80 and all(passed(made, Ask(key=key)) == "r5" for key in moved)
    held = router(4, rows=100)
    for name in ("r1", "r3"):
        held.holds(name, ["a"])
    chosen = {key: passed(held, Ask(adapters=("a",), key=key)) for key in range(40)}
    assert set(chosen.values()) == {"r1", "r3"}
    assert {key: passed(held, Ask(adapters=("a",), key=key)) for key in range(40)} == chosen


def test_a_start_never_outweighs_the_load() -> None:
    made = router(4, rows=2, most=100)
    names = [made.choose(Ask(key="one", tokens=10)) for _ in range(40)]
    assert max(Counter(names).values()) <= 14


@pytest.mark.parametrize("policy", ["affinity", "least", "random"])
def test_full_replicas_are_not_asked(policy: str) -> None:
    made = router(2, policy, most=3)
    taken = []
    with pytest.raises(QueueFullError, match="on their way"):
        for i in range(9):
            ask = Ask(adapters=(f"a{i}",))
            taken.append((made.choose(ask), ask))
    assert Counter(name for name, _ in taken) == {"r0": 3, "r1": 3}
    made.finished(*taken[0])
    assert made.choose(Ask(adapters=("z",))) == taken[0][0]
    by_tokens = router(1, policy, most=9, most_tokens=100)
    by_tokens.choose(Ask(tokens=500, adapters=("a",)))  # alone, anything may go in
    with pytest.raises(QueueFullError):
        by_tokens.choose(Ask(tokens=1, adapters=("b",)))


def test_one_adapter_cannot_fill_the_fleet() -> None:
    made = router(4, most=50)
    taken = 0
    with pytest.raises(QueueFullError, match="one model may not fill it"):
        while True:
            made.choose(Ask(adapters=("hog",)))
            taken += 1
    assert taken == SHARE / (1 + SHARE) * 200
    for i in range(20):  # others are taken still, the hog is not
        made.choose(Ask(adapters=(f"small{i}",)))
        with pytest.raises(QueueFullError):
            made.choose(Ask(adapters=("hog",)))


def test_replicas_that_drain_or_are_to_be_avoided() -> None:
    made = router(2)
    made.update([Place(name="r0", open=False), Place(name="r1")])
    assert {made.choose(Ask()) for _ in range(10)} == {"r1"}
    with pytest.raises(NoReplicaError):
        made.choose(Ask(), avoid={"r1"})
    with pytest.raises(NoReplicaError):
        Router().choose(Ask())


def test_what_a_replica_says_counts_but_for_what_is_on_its_way_there() -> None:
    made = router(1, room=3)
    asks = [Ask(adapters=(a,)) for a in "abc"]
    for ask in asks:
        made.choose(ask)
    for ask in asks[1:]:
        made.finished("r0", ask)
    made.holds("r0", ["z", "b"])
    assert set(made.places["r0"].held) == {"a", "z", "b"}  # a is on its way, c is not there


@pytest.mark.parametrize("policy", ["affinity", "least"])
@pytest.mark.parametrize("seed", range(5))
def test_counts_hold_whatever_happens(seed: int, policy: str) -> None:
    rng = random.Random(seed)
    made, sent, born = router(4, policy, room=3, rows=2, most=12, most_tokens=300), [], 4
    for _ in range(800):
        what = rng.random()
        if what < 0.5:
            adapters = tuple(f"a{min(int(rng.expovariate(0.3)), 20)}" for _ in range(rng.choice((0, 1, 1, 1))))
            ask = Ask(adapters=adapters, key=rng.choice((None, rng.randrange(5))), tokens=rng.randrange(1, 60))
            avoid = rng.sample(list(made.places), 1) if rng.random() < 0.1 else ()
            fit = [p.load for p in made.places.values() if p.name not in avoid and p.takes(ask.tokens)]
            with contextlib.suppress(QueueFullError, NoReplicaError):
                sent.append((made.choose(ask, avoid), ask))
                tokens, asked = made.places[sent[-1][0]].load
                assert policy != "least" or (tokens - ask.tokens, asked - 1) == min(fit)
        elif what < 0.9 and sent:
            made.finished(*sent.pop(rng.randrange(len(sent))))
        elif what < 0.95 and made.places:
            name = rng.choice(list(made.places))
            made.holds(name, [f"a{i}" for i in rng.sample(range(20), rng.randrange(4))])
        elif what < 0.97 and len(made.places) > 2:
            made.lost(rng.choice(list(made.places)))
        elif what < 0.99:
            born += 1
            limits = {"room": 3, "rows": 2, "most": 12, "most_tokens": 300}
            names = [*made.places, f"r{born}"][-6:]
            made.update([Place(name=n, open=rng.random() < 0.8, **limits) for n in names])
        consistent(made, sent)


def test_what_least_load_keeps_does_not_grow() -> None:
    made = router(3, "least", most=1000, most_tokens=10**9)
    for i in range(3000):  # loads rise and fall again, and every one of them is another
        ask = Ask(adapters=(), key=None, tokens=1000 + i)
        made.finished(made.choose(ask), ask)
        if i % 5 == 0:
            made.choose(Ask(adapters=(), key=None, tokens=1))
    assert len(made._loads) <= 8 * 3


def test_the_ring_names_each_once() -> None:
    ring = Ring([f"r{i}" for i in range(7)])
    assert sorted(ring.walk("x", 7)) == [f"r{i}" for i in range(7)] and len(list(ring.walk("x", 3))) == 3
    assert list(Ring().walk("x", 2)) == []
