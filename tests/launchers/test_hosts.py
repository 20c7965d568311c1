"""Lists of hosts are read as mpiexec reads them, and what could not meet is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainfleet.errors import LaunchError
from trainfleet.launchers.hosts import Host, check_meeting, nproc_of, read_hosts, read_hosts_file


def test_names_users_and_slots() -> None:
    hosts = read_hosts("node-0, ann@node-1:4,10.0.0.3")
    assert hosts == [Host(target="node-0"), Host(target="ann@node-1", slots=4), Host(target="10.0.0.3")]
    assert [host.name for host in hosts] == ["node-0", "node-1", "10.0.0.3"]
    assert read_hosts("fe80::1,fe80::2")[0].target == "fe80::1"


def test_a_file_in_either_manner(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# the rack\nnode-0 slots=4 max_slots=8\n\nnode-1:4  # new\n")
    hosts = read_hosts_file(path)
    assert hosts == [Host(target="node-0", slots=4), Host(target="node-1", slots=4)]
    assert nproc_of(hosts, None) == 4
    assert nproc_of(hosts, 2) == 2
    assert nproc_of(read_hosts("a,b"), None) == 1


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("", "The list of hosts is empty"),
        ("a,b,a", "The host a is listed 2 times. List it once"),
        ("ann@a,bob@a", "The host a is listed 2 times"),
        ("-oProxyCommand=x", "is no host"),
        ("a;rm,b", "is no host"),
        ("a:many", "is no host"),
    ],
)
def test_what_cannot_be_meant_is_refused(words: str, complaint: str) -> None:
    with pytest.raises(LaunchError, match=complaint):
        read_hosts(words)


def test_a_place_that_each_host_takes_for_itself_is_refused() -> None:
    with pytest.raises(LaunchError, match="The hosts are to meet at localhost, which each of them takes for itself"):
        check_meeting("localhost", read_hosts("localhost,node-1"))
    check_meeting("127.0.0.1", read_hosts("127.0.0.1,127.0.0.2"))  # all are this host
    check_meeting("node-0", read_hosts("localhost,node-1"))


def test_unlike_slots_are_named() -> None:
    with pytest.raises(LaunchError, match="unlike numbers of slots: a 4, b 2"):
        nproc_of(read_hosts("a:4,b:2"), None)


def test_a_list_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="cannot be read: No such file"):
        read_hosts_file(tmp_path / "none")
