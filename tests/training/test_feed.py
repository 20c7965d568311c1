"""A recipe trains the same whether its data are here or come over the feed, and may change from one to the other."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from feeding import read_job, write_job  # noqa: E402
from left_behind import nothing_left_behind  # noqa: E402
from rank_pool import RankPools  # noqa: E402

from trainfleet.data.feed import DataService, RemoteBatches  # noqa: E402
from trainfleet.errors import ConfigError, DataError, NotAdmitted, PeerError  # noqa: E402
from trainfleet.net.credentials import Credentials  # noqa: E402
from trainfleet.net.token import Token  # noqa: E402
from trainfleet.training import job  # noqa: E402
from trainfleet.training.dry_run import check  # noqa: E402
from trainfleet.training.feed import as_fed, refuse_unlike_feeders, service_of, without_tokens  # noqa: E402
from trainfleet.training.proof.verify_recipe import verify_recipe  # noqa: E402
from trainfleet.training.recipe import Recipe  # noqa: E402

HERE = "127.0.0.1:0"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_job(tmp_path)


def served(path: Path, **ways: Any) -> DataService:
    """By a worker: made in this process, samples would move the random generators that dropout draws from."""
    return service_of(read_job(path, "data.workers=1"), address=HERE, **ways).open()


def fed(recipe: Recipe, *services: Any, **more: Any) -> Recipe:
    return as_fed(recipe, feeders=[str(service.address) for service in services], **more)


def what_became(folder: str) -> dict[str, Any]:
    """Loss and norm of each step, evaluations, and the last weights."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return {
        "steps": [(row["step"], row["loss"], row["grad_norm"]) for row in rows if row["event"] == "StepEnded"],
        "evaluations": [(row["step"], row["loss"]) for row in rows if row["event"] == "Evaluated"],
        "weights": torch.load(Path(folder) / "end.pt") if (Path(folder) / "end.pt").exists() else None,
    }


def same(one: str, other: str) -> bool:
    ours, theirs = what_became(one), what_became(other)
    assert len(ours["steps"]) == 14 and len(ours["evaluations"]) == 2
    weights = all(torch.equal(ours["weights"][name], theirs["weights"][name]) for name in ours["weights"])
    return weights and ours["steps"] == theirs["steps"] and ours["evaluations"] == theirs["evaluations"]


def test_a_fed_run_ends_as_the_local_one_to_the_bit(path: Path, tmp_path: Path) -> None:
    local = read_job(path, f"folder={tmp_path / 'local'}")
    over = read_job(path, f"folder={tmp_path / 'fed'}")
    job.run(local)
    with nothing_left_behind(), ExitStack() as opened:
        services = [opened.enter_context(served(path)) for _ in range(2)]
        assert job.run(fed(over, *services)).reason == "finished"
        assert all(service.served.batches for service in services)
    assert same(local.folder, over.folder)


@pytest.mark.parametrize("first", ["local", "fed"])
def test_a_run_goes_on_where_its_data_come_from_elsewhere(path: Path, tmp_path: Path, first: str) -> None:
    whole = read_job(path, f"folder={tmp_path / 'whole'}")
    half = read_job(path, f"folder={tmp_path / 'two'}", "train.steps=7", "train.finish=null")
    rest = read_job(path, f"folder={tmp_path / 'two'}")
    job.run(whole)
    with served(path) as service:
        job.run(half if first == "local" else fed(half, service))
        job.run(fed(rest, service) if first == "local" else rest)
    theirs, ours = what_became(whole.folder), what_became(rest.folder)
    assert ours["steps"] == theirs["steps"]
    assert all(torch.equal(ours["weights"][name], theirs["weights"][name]) for name in theirs["weights"])


def train_on_ranks(path: str, folder: str, address: str | None) -> str:
    recipe = read_job(Path(path), f"folder={folder}", "plan.zero=2")
    job.run(recipe if address is None else as_fed(recipe, feeders=[address]))
    return recipe.folder


def test_each_of_two_ranks_asks_for_its_share(ranks: RankPools, path: Path, tmp_path: Path) -> None:
    local = ranks(2, train_on_ranks, str(path), str(tmp_path / "local"), None)[0]
    with served(path) as service:
        over = ranks(2, train_on_ranks, str(path), str(tmp_path / "fed"), str(service.address))[0]
    assert same(local, over)


def test_check_and_verify_take_the_feeders_batches(path: Path, tmp_path: Path) -> None:
    recipe = read_job(path)
    with served(path) as service:
        assert "data    remote: 90 samples" in check(fed(recipe, service), 2)
    assert not (tmp_path / "run").exists()


@pytest.mark.matrix
def test_verify_takes_the_feeders_batches(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(path.parent))
    recipe = read_job(path, "plan.zero=2")
    with served(path) as service:
        assert verify_recipe(fed(recipe, service), 2, steps=2).holds


def test_a_token_is_not_written_down_with_a_run(path: Path) -> None:
    recipe = read_job(path, "train.steps=2")
    credentials = Credentials(secret=b"0123456789abcdef")
    with served(path, credentials=credentials) as service:
        assert service.listener is not None
        token = str(service.listener.token())
        assert job.run(as_fed(recipe, feeders=[token])).reason == "finished"
    written = (Path(recipe.folder) / "recipe.yaml").read_text()
    assert "(token)" in written and token not in written
    kept = [entry for entry in Path(recipe.folder).rglob("*") if entry.is_file()]
    assert kept and not any(token.encode() in entry.read_bytes() for entry in kept)
    with pytest.raises(ConfigError, match="not kept with a run"):
        check(without_tokens(as_fed(recipe, feeders=[token])), 1)


def test_a_wrong_token_and_no_feeder_at_all_are_said(path: Path) -> None:
    recipe = read_job(path)
    credentials = Credentials(secret=b"0123456789abcdef")
    with served(path, credentials=credentials) as service:
        wrong = Credentials(secret=b"fedcba9876543210").token([service.address])
        with pytest.raises(NotAdmitted):
            check(as_fed(recipe, feeders=[str(wrong)]), 1)
        gone = service.address
    with pytest.raises(PeerError, match=r"Waited 0.5 s for the first feeder.*port is closed"):
        check(as_fed(recipe, feeders=[str(gone)], timeout=0.5), 1)
    nowhere = Token.make(["no-such-host.invalid:7"], fingerprint=bytes(32))
    with pytest.raises(PeerError, match="does not know that name"):
        check(as_fed(recipe, feeders=[str(nowhere)], timeout=0.5), 1)


def test_what_cannot_be_served_is_refused(path: Path) -> None:
    recipe = read_job(path)
    with pytest.raises(ConfigError, match="for the side that trains"):
        service_of(as_fed(recipe, feeders=["a:1"]), address=HERE)
    assert recipe.data.source is not None
    module = recipe.data.source.partition(":")[0]
    with pytest.raises(ConfigError, match=r"data\.source is only iterated"):
        service_of(read_job(path, f"data.source={module}:stream"), address=HERE)


def test_streams_whose_feeders_differ_are_refused(path: Path) -> None:
    world: Any = SimpleNamespace(exchange=lambda value: [value])
    other = service_of(read_job(path, "data.args={shift: 1.0}"), address=HERE)
    with (
        service_of(read_job(path), address=HERE).open() as service,
        other.open(),
        RemoteBatches(str(service.address)) as ours,
        RemoteBatches(str(service.address), stream="evaluation") as alike,
        RemoteBatches(str(other.address)) as unlike,
    ):
        refuse_unlike_feeders(world, ours, alike, None)
        with pytest.raises(DataError, match="make other samples"):
            refuse_unlike_feeders(world, ours, unlike)


def test_a_split_validated_each_epoch_and_stopped_early_is_the_same_over_the_feed(path: Path, tmp_path: Path) -> None:
    """Of 90 samples 9 are held out, so an epoch is 10 steps of 8; the rate is so high that it gets no better soon."""
    train = {"steps": 200, "evaluate_every": "epoch", "early_stopping": 2}
    path = write_job(path.parent, data={"evaluation": {"fraction": 0.1}}, train=train, optimizer={"lr": 0.3})
    recipes = [read_job(path, f"folder={tmp_path / name}") for name in ("local", "fed")]
    local = job.run(recipes[0])
    assert local.reason == "stopped early" and local.step < 200 and local.step % 10 == 0
    with served(path) as service:
        assert [offer.samples for offer in service.offers.values()] == [81, 9]
        over = job.run(fed(recipes[1], service))
    assert over == local
    ours, theirs = what_became(recipes[0].folder), what_became(recipes[1].folder)
    assert ours["steps"] == theirs["steps"] and ours["evaluations"] == theirs["evaluations"]
    assert [step for step, _ in ours["evaluations"]] == list(range(10, local.step + 1, 10))
    assert all(torch.equal(ours["weights"][name], theirs["weights"][name]) for name in ours["weights"])
