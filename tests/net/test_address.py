from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainfleet.errors import ConfigError
from trainfleet.net.address import DEFAULT_PORT, Address, is_loopback_number, obstacle


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("cpu-0:7701", "cpu-0", 7701),
        ("cpu-0", "cpu-0", DEFAULT_PORT),
        (" 10.0.0.7:1 ", "10.0.0.7", 1),
        ("[::1]:7701", "::1", 7701),
        ("[fe80::1]", "fe80::1", DEFAULT_PORT),
        ("::1", "::1", DEFAULT_PORT),
        ("0.0.0.0:0", "0.0.0.0", 0),
    ],
)
def test_an_address_is_a_host_and_a_port_and_is_written_as_it_is_read(text, host, port):
    address = Address.parse(text)
    assert (address.host, address.port) == (host, port)
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("cpu-0:", "port"),
        ("cpu-0:http", "'http'"),
        ("cpu-0:65536", "65536"),
        ("cpu-0:-1", "'-1'"),
        ("cpu-0:٣", "port"),
        (":7700", "0.0.0.0:7700"),
        ("", "names no host"),
        ("[::1", "brackets"),
        ("[cpu-0]:1", "brackets"),
        ("[::1]7700", "brackets"),
        ("http://cpu-0:7700", "port"),
        ("user@cpu-0", "host:port"),
        ("cpu\x000", "not the name"),
        ("a" * 254, "not the name"),
    ],
)
def test_what_is_no_address_is_refused_with_its_value(text, fact):
    with pytest.raises(ConfigError, match=fact):
        Address.parse(text)


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_a_sentence(text):
    try:
        assert Address.parse(str(Address.parse(text))) == Address.parse(text)
    except ConfigError as error:
        assert str(error).endswith(".")


@pytest.mark.parametrize(
    ("host", "inside"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("127.evil.example", False),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.7", False),
        ("localhost.example", False),
    ],
)
def test_loopback_is_what_means_this_host_to_everyone(host, inside):
    assert Address(host).is_loopback is inside
    assert is_loopback_number(host) is (inside and host != "localhost")


def test_a_name_that_does_not_resolve_cannot_be_listened_at():
    with pytest.raises(ConfigError, match=r"does not know the name no\.such\.host\.invalid"):
        Address("no.such.host.invalid").resolve()


def test_others_see_a_number_of_this_host_where_it_listens_at_all():
    seen = Address("0.0.0.0", 77).seen_by_others()
    assert seen and all(address.port == 77 and address.host not in ("0.0.0.0", "::") for address in seen)
    for address in seen:
        address.resolve()  # a number of this host
    assert Address("cpu-0", 77).seen_by_others() == [Address("cpu-0", 77)]


def test_every_obstacle_ends_a_sentence():
    errors = [socket.gaierror(-2, "x"), ConnectionRefusedError(), TimeoutError(), ConnectionResetError()]
    assert len({obstacle(error) for error in [*errors, OSError(101, "x"), OSError(5, "Input/output error")]}) == 6
    assert all(obstacle(error).endswith(".") for error in errors)
