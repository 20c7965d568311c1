"""Ranks find each other and compare versions, or all of them say the same sentence."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta

import pytest

pytest.importorskip("torch", reason="ranks meet at a store of torch")

from free_ports import free_port

from trainfleet.comm import rendezvous
from trainfleet.comm.environment import RankEnvironment
from trainfleet.errors import LaunchError, PeerError

pytestmark = pytest.mark.cluster


def meet(rank: int, world_size: int, port: int, facts: dict[str, str] | None = None, seconds: float = 20) -> object:
    environment = RankEnvironment(rank=rank, world_size=world_size, master_port=port)
    return rendezvous.meet(environment, timeout=timedelta(seconds=seconds), facts=facts)


def met(port: int, lag: float) -> list[str]:
    """Twice, with one rank late, over one lasting store."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        time.sleep(lag)
    found = []
    for _ in range(2):
        store = meet(dist.get_rank(), dist.get_world_size(), port)
        store.set(f"word/{dist.get_rank()}", f"{dist.get_rank()}")
        found += [store.get(f"word/{rank}").decode() for rank in range(dist.get_world_size())]
        dist.barrier()
    rendezvous.leave("127.0.0.1", port)
    return found


def test_ranks_meet_whoever_comes_first(ranks):
    assert ranks(3, met, free_port(), 0.3) == [["0", "1", "2"] * 2] * 3


def differ(port: int) -> str:
    import torch.distributed as dist

    facts = {"torch": "2.0" if dist.get_rank() == 2 else "2.1"}
    try:
        meet(dist.get_rank(), dist.get_world_size(), port, facts)
    except PeerError as exc:
        return str(exc)
    finally:
        dist.barrier()
        rendezvous.leave("127.0.0.1", port)
    return "nothing"


def test_every_rank_hears_which_one_is_unlike(ranks):
    host = socket.gethostname()
    sentence = f"Rank 2 ({host}) has torch 2.0, but rank 0 ({host}) has torch 2.1. Use the same everywhere."
    assert ranks(3, differ, free_port()) == [sentence] * 3


def wait_for_one_more(port: int) -> str:
    import torch.distributed as dist

    with pytest.raises(PeerError) as caught:
        meet(dist.get_rank(), dist.get_world_size() + 1, port, seconds=0.5)
    dist.barrier()
    rendezvous.leave("127.0.0.1", port)
    return str(caught.value)


def test_every_rank_hears_who_did_not_come(ranks):
    for sentence in ranks(2, wait_for_one_more, free_port()):
        assert sentence.startswith("Of 3 ranks, rank 2 did not come within 0.5 s.")


def test_one_rank_opens_no_port():
    assert type(rendezvous.meet(RankEnvironment(), timeout=timedelta(seconds=1))).__name__ == "HashStore"


def test_an_occupied_port_and_a_foreign_listener_are_told_apart():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(LaunchError, match=f"Port {port} of this host is in use, so rank 0 cannot listen"):
            meet(0, 2, port, seconds=1)
        with pytest.raises(PeerError, match=f"found something at 127.0.0.1:{port} that is not rank 0"):
            meet(1, 2, port, seconds=1)


def test_the_interface_towards_a_host_is_the_one_that_bears_its_address(monkeypatch):
    assert rendezvous.interface_towards("127.0.0.1") == "lo"
    assert rendezvous.address_towards("nowhere.invalid") is None
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "chosen0")
    rendezvous._name_interface("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "chosen0"  # what the user has set stays


def test_versions_name_what_must_be_alike():
    assert set(rendezvous.versions()) == {"trainfleet", "torch", "python"}
