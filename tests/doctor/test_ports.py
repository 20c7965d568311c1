from __future__ import annotations

import json
import os
import socket

import pytest

from trainfleet.cli.main import main
from trainfleet.doctor import ports


def doctor(capsys, *arguments: str) -> tuple[int, list[dict[str, str]]]:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "ports", *arguments, "--json"])
    return int(ended.value.code or 0), json.loads(capsys.readouterr().out)


def test_the_usual_ports_are_looked_at_and_free_ones_are_named(capsys):
    code, found = doctor(capsys)
    assert code == 0, "a usual port in use is a note"
    assert [each["subject"] for each in found] == ["port 7700", "port 7800", "port 29500", "free"]
    assert "feed" in found[0]["fact"] and "rendezvous" in found[2]["fact"]


def test_a_chosen_port_is_free_on_every_interface(capsys):
    (port,) = ports.free_ports(1)
    code, found = doctor(capsys, str(port))
    assert code == 0 and found[0]["fact"].startswith("can be listened at on ") and "127.0.0.1" in found[0]["fact"]
    assert "trainfleet doctor THIS-HOST:PORT" in found[0]["remedy"]


def test_a_port_in_use_names_who_has_it_and_another_that_is_free(capsys):
    with socket.create_server(("0.0.0.0", 0)) as server:
        code, found = doctor(capsys, str(server.getsockname()[1]))
    assert code == 2 and found[0]["verdict"] == "no"
    assert f"(process {os.getpid()}) has it" in found[0]["fact"]
    assert "such as " in found[0]["remedy"]


def test_a_port_in_use_on_one_interface_only_says_where_it_is_free(capsys, monkeypatch):
    monkeypatch.setattr(ports, "interfaces", lambda: {"lo 127.0.0.1": "127.0.0.1", "lo 127.0.0.2": "127.0.0.2"})
    with socket.create_server(("127.0.0.1", 0)) as server:
        _, found = doctor(capsys, str(server.getsockname()[1]))
    assert found[0]["fact"].startswith("in use on lo 127.0.0.1, free on lo 127.0.0.2")


def test_a_port_that_is_not_ours_to_take_is_said(capsys, monkeypatch):
    monkeypatch.setattr(ports, "_obstacle", lambda host, port: "not permitted")
    code, found = doctor(capsys, "80")
    assert code == 2 and "Ports below 1024 are for root" in found[0]["remedy"]


def test_free_ports_are_free_and_differ():
    found = ports.free_ports(5)
    assert len(set(found)) == 5
    for port in found:
        socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.parametrize("word", ["http", "0", "65536", "-1"])
def test_what_is_no_port_is_refused(capsys, word):
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "ports", "--", word])
    assert ended.value.code == 2 and "no port" in capsys.readouterr().err


def test_the_usual_ports_are_one_line_while_they_are_free_and_told_one_by_one_else(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (free,) = ports.free_ports(1)
        monkeypatch.setattr(ports, "usual_ports", lambda: {port: "feed", free: "rendezvous"})
        (taken,) = ports.check_usual_ports()
    assert taken.verdict == "note" and f"(process {os.getpid()}) has it" in taken.fact and "(feed)" in taken.fact
    (all_free,) = ports.check_usual_ports()
    assert all_free.verdict == "ok" and f"{port} (feed), {free} (rendezvous) are free" in all_free.fact
