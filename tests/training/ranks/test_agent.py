"""The agent runs ranks of this host, and gives back signals and logging as they were."""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch", reason="the agent is torch's")

from torch.distributed.elastic.rendezvous.api import RendezvousError

from trainfleet.errors import RankFailed
from trainfleet.training.ranks.agent import Job, _Agent, run_command


def test_a_command_runs_as_every_rank_and_all_is_as_before(tmp_path: Path) -> None:
    elastic = logging.getLogger("torch.distributed.elastic")
    before = signal.getsignal(signal.SIGTERM), elastic.propagate, list(elastic.handlers)
    program = f"import os; open(r'{tmp_path}/' + os.environ['RANK'], 'w').write(os.environ['OMP_NUM_THREADS'])"
    assert run_command(Job(nproc=2), [sys.executable, "-c", program], threads=3) == 0
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["3", "3"]
    assert (signal.getsignal(signal.SIGTERM), elastic.propagate, list(elastic.handlers)) == before


def test_a_dollar_in_a_command_is_a_dollar(tmp_path: Path) -> None:
    target = tmp_path / "said"
    assert run_command(Job(nproc=1), ["sh", "-c", f"echo 'a $rank b' > {target}"], threads=None) == 0
    assert target.read_text() == "a $rank b\n"


def test_a_failing_rank_is_raised_by_name() -> None:
    with pytest.raises(RankFailed, match=r"Rank 0 of 1 on .* ended with exit code 7"):
        run_command(Job(nproc=1), ["sh", "-c", "exit 7"], threads=None)


FAILING = """
import sys
from pathlib import Path
from trainfleet.training.ranks.failure import note_step, reported_failures

starts = Path(sys.argv[1])
count = len(starts.read_text()) if starts.exists() else 0
starts.write_text("x" * (count + 1))
with reported_failures():
    error = ValueError(sys.argv[2 + min(count, 1)])
    note_step(error, 7)
    raise error
"""


@pytest.mark.parametrize(
    ("messages", "starts", "said"),
    [
        (("no such key", "no such key"), 2, "failed twice in the same way after step 7, so it was not started again"),
        (("<object at 0x7f01>", "<object at 0x7f02>"), 2, "failed twice in the same way"),
        (("one", "another"), 3, "failed twice in the same way"),
    ],
)
def test_the_same_error_at_the_same_step_twice_ends_the_run(
    tmp_path: Path, messages: tuple[str, str], starts: int, said: str
) -> None:
    command = [sys.executable, "-c", FAILING, str(tmp_path / "starts"), *messages]
    with pytest.raises(RankFailed, match=said):
        run_command(Job(nproc=1, max_restarts=9), command, threads=None)
    assert len((tmp_path / "starts").read_text()) == starts


def test_ranks_that_were_killed_are_started_as_often_as_allowed(tmp_path: Path) -> None:
    command = ["sh", "-c", f"echo >> {tmp_path / 'starts'}; kill -9 $$"]
    with pytest.raises(RankFailed, match="was killed by SIGKILL"):
        run_command(Job(nproc=1, max_restarts=3), command, threads=None)
    assert len((tmp_path / "starts").read_text()) == 4


class LostStore:
    """A store that other hosts no longer write to."""

    def set(self, key: str, value: str) -> None:
        pass

    def get(self, key: str) -> bytes:
        if key.endswith("/0"):
            return b"1"
        raise RuntimeError("wait timeout after 600000ms, keys: /trainfleet/restarts/1")


def test_a_host_that_does_not_say_how_often_it_has_started_is_a_peer_that_is_lost() -> None:
    agent = object.__new__(_Agent)
    agent._remaining_restarts = 1
    group: Any = SimpleNamespace(
        group_world_size=2, group_rank=0, store=LostStore(), spec=SimpleNamespace(max_restarts=2)
    )
    with pytest.raises(RendezvousError, match=r"could not agree on the number of restarts \(wait timeout"):
        agent._agree_on_restarts(group)


def test_ranks_are_told_once_to_end_before_they_start_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    shutdown = _Agent._shutdown

    def counted(self: _Agent, *args: Any, **options: Any) -> None:
        told.append("end")
        shutdown(self, *args, **options)

    monkeypatch.setattr(_Agent, "_shutdown", counted)
    command = ["sh", "-c", f"echo >> {tmp_path / 'starts'}; kill -9 $$"]
    with pytest.raises(RankFailed):
        run_command(Job(nproc=1, max_restarts=1), command, threads=None)
    # Once before the second start, once when no more are allowed, and once at the end of all.
    assert (len((tmp_path / "starts").read_text()), len(told)) == (2, 3)
