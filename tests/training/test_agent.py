"""The agent runs ranks of this host, and gives back signals and logging as they were."""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the agent is torch's")

from trainfleet.errors import RankFailed
from trainfleet.training.agent import Job, run_command


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
