"""`--tunnel`: refused in words before anything opens; where a way in moves, the line to run is printed again."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from trainfleet.cli.way_in import check_way, opened_way
from trainfleet.errors import ConfigError
from trainfleet.net.address import Address


class Service:
    address = Address("127.0.0.1", 7700)

    def token(self, addresses=()):
        return f"token of {addresses[0]}"


def test_no_tunnel_is_no_way_in():
    check_way(None, Path("certs"))
    assert isinstance(opened_way(None, Service(), "line"), nullcontext)


def test_what_does_not_go_together_is_refused():
    check_way("cloudflared")
    with pytest.raises(ConfigError, match="no tunnel"):
        check_way("frp")
    with pytest.raises(ConfigError, match="Leave one of them out"):
        check_way("ngrok", Path("certs"))


def test_the_line_is_printed_again_where_the_way_moved(monkeypatch, capsys):
    class Entrance:
        def __init__(self, way, port, *, moved):
            assert (way, port) == ("ngrok", 7700)
            moved(Address("1.tcp.ngrok.io", 17))

    monkeypatch.setattr("trainfleet.net.entrance.Entrance", Entrance)
    assert isinstance(opened_way("ngrok", Service(), "trainfleet train r.yaml --feed"), Entrance)
    said = capsys.readouterr().out
    assert "\n  trainfleet train r.yaml --feed token of 1.tcp.ngrok.io:17\n" in said
