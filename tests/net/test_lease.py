"""Each unit is with somebody who is here, or waits for one; the first answer counts, and no unit is lost."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from trainfleet.net.lease import LATE_SECONDS, Leases

UNIT = (0, 0, 8)


def with_units(count, **rooms):
    leases = Leases()
    for name, room in rooms.items():
        leases.join(name, room=room)
    for task in range(count):
        leases.add(task, UNIT)
    return leases


def test_nobody_gets_more_than_it_has_room_for():
    leases = with_units(10, a=2, b=3)
    given_ = leases.give(0.0)
    assert [task for _, task, _ in given_] == [0, 1, 2, 3, 4]
    assert sorted(name for name, _, _ in given_) == ["a", "a", "b", "b", "b"]
    assert leases.give(0.0) == []
    assert leases.arrived("a", 0, 1.0)
    assert [task for _, task, _ in leases.give(1.0)] == [5]


def test_the_units_of_a_peer_that_left_go_to_others_first():
    leases = with_units(6, a=2, b=2)
    leases.give(0.0)
    assert leases.leave("a") == 2 and leases.leave("a") == 0
    leases.join("c", room=9)
    again = leases.give(1.0)
    assert [name for name, _, _ in again] == ["c"] * 4
    assert [task for _, task, _ in again] == sorted(task for _, task, _ in again), "those that are needed first"


def test_whoever_is_quicker_gets_more():
    leases = with_units(0, slow=4, quick=4)
    task, clock, done = 0, 0.0, {"slow": 0, "quick": 0}
    ends = []
    for _ in range(400):
        while len(leases) < 6:
            leases.add(task, UNIT)
            task += 1
        for name, number, _ in leases.give(clock):
            before = max([clock] + [end for end, who, _ in ends if who == name])
            ends.append((before + (0.9 if name == "slow" else 0.1), name, number))
        ends.sort()
        clock, name, number = ends.pop(0)
        assert leases.arrived(name, number, clock)
        done[name] += 1
    assert done["quick"] > 5 * done["slow"]


def test_a_late_unit_is_asked_of_another_and_the_first_answer_counts():
    leases = with_units(2, a=1)
    leases.give(0.0)
    leases.join("b", room=1)
    leases.give(0.0)
    assert leases.arrived("b", 1, 0.1)
    assert leases.hasten(0, LATE_SECONDS / 2) == []
    assert leases.hasten(0, 2 * LATE_SECONDS) == [("b", 0, UNIT)]
    assert leases.hasten(0, 9 * LATE_SECONDS) == [], "two have it"
    assert leases.arrived("b", 0, 3.0)
    assert not leases.arrived("a", 0, 4.0), "nobody wants it any more"
    assert len(leases) == 0


def test_a_unit_that_two_had_is_not_pending_while_one_of_them_is_here():
    leases = with_units(1, a=1, b=1)
    ((first, _, _),) = leases.give(0.0)
    ((second, _, _),) = leases.hasten(0, 99.0)
    assert leases.leave(first) == 0 and leases.leave(second) == 1


def test_room_grows_where_a_peer_is_idle_and_only_there():
    leases = with_units(8, a=4, b=4)
    for name, task, _ in leases.give(0.0):
        leases.arrived(name, task, 1.0, 100, idle=name == "a")
    assert leases.room > 8 and leases.unit_bytes == 100
    leases.clear()
    assert len(leases) == 0 and leases.give(0.0) == []


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "join", "leave", "give", "arrive", "hasten"]), st.integers(0, 3)), max_size=60
    )
)
def test_whatever_happens_every_unit_arrives(events):
    """With peers that come and go, each wanted unit is pending or held by somebody who is here."""
    leases, task, clock, here, held = Leases(), 0, 0.0, set(), {}
    arrived = []
    for event, who in [*events, ("join", 9), ("give", 0)]:
        clock += 1.0
        if event == "add":
            leases.add(task, UNIT)
            task += 1
        elif event == "join" and who not in here:
            leases.join(who, room=1000 if who == 9 else 2)
            here.add(who)
            held[who] = []
        elif event == "leave":
            leases.leave(who)
            here.discard(who)
            held.pop(who, None)
        elif event == "give":
            for name, number, _ in leases.give(clock):
                assert name in here
                held[name].append(number)
        elif event == "hasten" and task:
            for name, number, _ in leases.hasten(who % task, clock):
                held[name].append(number)
        elif event == "arrive" and held.get(who):
            number = held[who].pop(0)
            if leases.arrived(who, number, clock):
                arrived.append(number)
    for name, numbers in held.items():
        arrived += [number for number in numbers if leases.arrived(name, number, clock)]
    assert sorted(arrived) == list(range(task)) and len(leases) == 0
