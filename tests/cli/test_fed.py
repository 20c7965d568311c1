"""Spare CPUs of the trainer's host make batches beside the feeders of other hosts, and alone where those are away."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from feeding import read_job, write_job  # noqa: E402
from left_behind import nothing_left_behind  # noqa: E402

from trainfleet.cli.fed import Fed  # noqa: E402
from trainfleet.cli.main import main  # noqa: E402
from trainfleet.errors import ConfigError  # noqa: E402
from trainfleet.net.listener import Listener  # noqa: E402
from trainfleet.training import job  # noqa: E402
from trainfleet.training.feed import service_of  # noqa: E402


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_job(tmp_path)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(folder / "end.pt")
    return found


def same(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_own_workers_go_on_without_the_feeder_and_train_the_same_to_the_bit(path: Path, tmp_path: Path) -> None:
    job.run(read_job(path, f"folder={tmp_path / 'local'}"))
    with Listener("127.0.0.1:0", role="feeder") as nobody:
        away = str(nobody.address)  # a feeder that is not there
    with nothing_left_behind():
        assert run("train", str(path), f"folder={tmp_path / 'fed'}", "--feed", away, "--own-workers", "2") == 0
    assert same(tmp_path / "local", tmp_path / "fed")


@pytest.mark.cluster
def test_ranks_of_a_host_share_its_own_feeder_with_those_of_others(path: Path, tmp_path: Path) -> None:
    spread = ["--nproc", "2", "plan.zero=2"]
    assert run("train", str(path), f"folder={tmp_path / 'local'}", *spread) == 0
    with service_of(read_job(path, "data.workers=1"), address="127.0.0.1:0").open() as service:
        feed = ["--feed", str(service.address), "--own-workers", "1"]
        assert run("train", str(path), f"folder={tmp_path / 'fed'}", *feed, *spread) == 0
        assert service.served.batches > 0
    assert same(tmp_path / "local", tmp_path / "fed")


def test_what_does_not_go_together_is_refused(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", str(path), "--own-workers", "2") == 2
    assert "--own-workers is for --feed" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="Give one of the two"):
        Fed(feeders=["a:1"], certs=None, tunnel="ngrok", own_workers=None)
    with pytest.raises(ConfigError, match="a launcher has started this one"):
        Fed(feeders=["a:1"], certs=None, tunnel=None, own_workers=1).refuse_among_started()
