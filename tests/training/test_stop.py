"""A signal on one rank ends the run on all of them after the same step."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from rank_pool import RankPools

from trainfleet.comm.threads import run_ranks
from trainfleet.training.stop import StopVote


def votes(rank_of_signal: int) -> list[bool]:
    from trainfleet.mesh import Mesh

    answers = []
    with Mesh.from_env() as mesh, StopVote(mesh.data_axes) as vote:
        for step in range(4):
            if step == 2 and mesh.rank == rank_of_signal:
                os.kill(os.getpid(), signal.SIGTERM)
            vote.begin()
            answers.append(vote.says_stop())
    return answers


def test_a_signal_on_any_rank_is_heard_by_all_in_the_same_step(ranks: RankPools) -> None:
    assert ranks(2, votes, 1) == [[False, False, True, True]] * 2


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def use(group):  # type: ignore[no-untyped-def]
        with StopVote(group):
            return signal.getsignal(signal.SIGTERM)

    assert run_ranks(1, use) == [before], "outside the main thread nothing is caught"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def ctrl_c_is_heard() -> Iterator[None]:
    """Also where a shell started the tests in the background, and had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_has_its_usual_effect(ctrl_c_is_heard: None) -> None:
    pytest.importorskip("torch")
    from trainfleet.mesh import Mesh

    with Mesh.from_env() as mesh, StopVote(mesh.data_axes), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
