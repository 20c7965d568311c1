"""Rank 0 notices who is missing, who came twice, who is unlike and whose clock is wrong; all hear the same."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch", reason="the roll is called in a store of torch")

from torch.distributed import HashStore

from trainfleet.comm import roll_call
from trainfleet.comm.environment import RankEnvironment
from trainfleet.comm.roll_call import RollCall
from trainfleet.errors import PeerError


@pytest.fixture(autouse=True)
def hosts(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Each thread is a host of its own, named as the thread; how far its clock is wrong is set here."""
    wrong: dict[str, float] = {}
    here = threading.current_thread
    monkeypatch.setattr(roll_call, "socket", SimpleNamespace(gethostname=lambda: here().name))
    now = roll_call.time.time
    monkeypatch.setattr(
        roll_call,
        "time",
        SimpleNamespace(
            time=lambda: now() + wrong.get(here().name, 0.0),
            monotonic=roll_call.time.monotonic,
            sleep=roll_call.time.sleep,
        ),
    )
    return wrong


def call(
    *places: tuple[int, int],
    facts: Callable[[int], dict[str, str]] = lambda rank: {},
    store: Any = None,
    **options: Any,
) -> list[str]:
    """What each of the (rank, world size) heard; empty where all was well. The n-th comes from host n."""
    store = store or HashStore()
    heard = ["?"] * len(places)

    def answer(number: int, rank: int, size: int) -> None:
        environment = RankEnvironment(rank=rank, world_size=size, agent_store=options.get("agent_store", False))
        part = RollCall(
            store=store,
            environment=environment,
            facts=facts(number),
            timeout=timedelta(seconds=options.get("seconds", 5)),
            noun=options.get("noun", "rank"),
        )
        try:
            part.answer()
            heard[number] = ""
        except PeerError as exc:
            heard[number] = str(exc)

    threads = [
        threading.Thread(target=answer, args=(number, *place), name=f"host{number}")
        for number, place in enumerate(places)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return heard


def test_ranks_that_are_alike_pass():
    assert call((0, 3), (1, 3), (2, 3)) == ["", "", ""]


def test_a_rank_that_came_twice_is_named_with_both_hosts():
    heard = call((0, 3), (1, 3), (1, 3), seconds=30)
    assert len(set(heard)) == 1
    assert "Rank 1 of 3 came twice: from host" in heard[0] and "from 0 to 2" in heard[0]
    assert {"host1", "host2"} <= set(heard[0].replace(".", " ").split())


def test_a_rank_that_comes_again_when_all_have_met_is_refused():
    store = HashStore()
    assert call((0, 2), (1, 2), store=store) == ["", ""]
    assert call((1, 2), store=store)[0].startswith("Rank 1 of 2 came twice: from host1 and from host0.")


def test_ranks_that_were_told_unlike_numbers_are_named():
    heard = call((0, 2), (1, 2), (2, 4))
    assert heard[2] and "was told of" in heard[2] and "Tell all of them the same number." in heard[2]
    assert heard[:2] in ([heard[2]] * 2, [""] * 2)  # the two of two may have met before the stranger came


def test_the_number_that_is_told_is_compared_before_anyone_is_missed():
    heard = call((0, 3), (1, 2), seconds=30)  # without it: half a minute, then a rank is missed
    assert len(set(heard)) == 1 and "was told of" in heard[0]


def test_unlike_facts_name_the_rank_and_both_values():
    heard = call((0, 2), (1, 2), facts=lambda number: {"torch": f"2.{number}"})
    assert heard == ["Rank 1 (host1) has torch 2.1, but rank 0 (host0) has torch 2.0. Use the same everywhere."] * 2


def test_who_does_not_come_is_named_to_all():
    heard = call((0, 4), (2, 4), seconds=0.3)
    assert heard == [heard[0]] * 2
    assert heard[0].startswith("Of 4 ranks, ranks 1, 3 did not come within 0.3 s.")


@pytest.mark.parametrize(("wrong", "word"), [(-60.0, "60 s behind"), (90.0, "90 s ahead of")])
def test_a_clock_that_is_wrong_is_said_and_the_run_goes_on(hosts, caplog, wrong, word):
    hosts["host1"] = wrong
    with caplog.at_level(logging.WARNING, "trainfleet"):
        logging.getLogger("trainfleet").propagate = True
        assert call((0, 3), (1, 3), (2, 3)) == ["", "", ""]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"The clock of host1 (rank 1) is {word} that of host0 (rank 0).")


def test_clocks_that_are_right_are_not_spoken_of(hosts, caplog):
    hosts["host1"] = 3.0
    logging.getLogger("trainfleet").propagate = True
    call((0, 2), (1, 2))
    assert not caplog.records


def test_a_host_may_come_back_to_a_run_that_goes_on_but_not_an_unlike_one():
    store = HashStore()
    assert call((0, 2), (1, 2), noun="host", store=store, facts=lambda _: {"torch": "2"}) == ["", ""]
    returning = {"store": store, "noun": "host"}
    assert call((1, 2), facts=lambda _: {"torch": "2"}, **returning) == [""]
    assert call((1, 2), facts=lambda _: {"torch": "3"}, **returning)[0].startswith("Host 1 (host0) has torch 3")


def test_ranks_of_an_agent_are_not_counted_twice():
    """The agent numbers them itself, and may start them again under the same count of restarts."""
    store = HashStore()
    store.add("claims/1", 1)
    assert call((0, 2), (1, 2), store=store, agent_store=True) == ["", ""]
