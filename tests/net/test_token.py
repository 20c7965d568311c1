from __future__ import annotations

import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainfleet.errors import ConfigError, NotAdmitted
from trainfleet.net.address import Address
from trainfleet.net.token import PREFIX, Token, is_token

FINGERPRINT = bytes(range(32))
TOKEN = Token.make(["10.0.0.7:7701"], fingerprint=FINGERPRINT)
RELAYED = Token.make(fingerprint=FINGERPRINT, via=Token.make(["relay.example"], fingerprint=FINGERPRINT[::-1]))

hosts = st.sampled_from(["cpu-0", "10.0.0.7", "::1", "a" * 253, "relay.example.org"])
addresses = st.lists(st.builds(Address, hosts, st.integers(0, 65535)), min_size=1, max_size=4)
secrets_ = st.binary(min_size=16, max_size=40)
prints = st.binary(min_size=32, max_size=32)
relays = st.none() | st.builds(lambda a, s, f: Token.make(a, secret=s, fingerprint=f), addresses, secrets_, prints)


@given(addresses, secrets_, prints, relays)
def test_a_token_comes_back_from_its_line(places, secret, fingerprint, via):
    token = Token.make(places, secret=secret, fingerprint=fingerprint, via=via)
    assert Token.parse(str(token)) == token


def test_a_token_of_one_address_is_one_word_of_108_letters_and_digits():
    assert len(str(TOKEN)) == 108
    assert str(TOKEN).removeprefix(PREFIX).isalnum() and str(TOKEN).islower()


def test_spaces_and_breaks_of_a_terminal_do_no_harm():
    text = str(RELAYED)
    assert Token.parse(f"  {text[:40]}\n  {text[40:]}\r\n") == RELAYED
    assert is_token(f" {text}") and not is_token("cpu-0:7700")


def test_every_cut_off_copy_is_said_to_be_cut_off():
    text = str(RELAYED)
    for length in range(len(PREFIX), len(text)):
        with pytest.raises(NotAdmitted, match=f"cut off: there are {length} of {len(text)}" if length > 11 else "cut"):
            Token.parse(text[:length])


def test_a_copy_without_its_beginning_is_no_token():
    with pytest.raises(NotAdmitted, match="begins with tf1_"):
        Token.parse(str(TOKEN)[3:])


@pytest.mark.parametrize("token", [TOKEN, RELAYED])
def test_every_single_wrong_character_is_found(token):
    text, chance = str(token), random.Random(1)
    for place in range(len(PREFIX), len(text)):
        other = chance.choice([letter for letter in "abcdefghijklmnopqrstuvwxyz234567" if letter != text[place]])
        with pytest.raises(NotAdmitted):
            Token.parse(text[:place] + other + text[place + 1 :])


@pytest.mark.parametrize("token", [TOKEN, RELAYED])
def test_every_other_last_letter_is_found(token):
    """Some of its bits may be of no byte."""
    text = str(token)
    for letter in set("abcdefghijklmnopqrstuvwxyz234567") - {text[-1]}:
        with pytest.raises(NotAdmitted):
            Token.parse(text[:-1] + letter)


def test_a_letter_that_no_token_has_is_named():
    with pytest.raises(NotAdmitted, match="'1' in it"):
        Token.parse(str(TOKEN)[:-1] + "1")


@settings(max_examples=300)
@given(st.text(max_size=300) | st.text(alphabet="abcdefghijklmnopqrstuvwxyz234567", max_size=300))
def test_any_text_is_a_token_or_a_sentence(text):
    for tried in (text, PREFIX + text):
        with pytest.raises(NotAdmitted):
            Token.parse(tried)


@settings(max_examples=300)
@given(st.binary(max_size=120))
@example(b"\x01\x02\x00\x80")
def test_a_body_that_says_what_cannot_be_is_refused_though_its_checksum_holds(body):
    """Someone may make a token by hand to harm whoever parses it."""
    from base64 import b32encode
    from hashlib import sha256

    sized = (len(body) + 4).to_bytes(2, "big") + body
    text = PREFIX + b32encode(sized + sha256(sized).digest()[:4]).decode().rstrip("=").lower()
    try:
        assert str(Token.parse(text)) == text
    except NotAdmitted as error:
        assert str(error).endswith(".")


def test_a_huge_text_is_refused_before_it_is_read():
    with pytest.raises(NotAdmitted, match="over 4096"):
        Token.parse(PREFIX + "a" * 10_000_000)


@pytest.mark.parametrize(
    ("make", "fact"),
    [
        (lambda: Token.make(["cpu-0"], fingerprint=None), "loopback only"),
        (lambda: Token.make(["127.0.0.1"], secret=b"short", fingerprint=None), "has 5 bytes"),
        (lambda: Token.make(["127.0.0.1"], fingerprint=b"short"), "SHA-256 has 32"),
        (lambda: Token.make([], fingerprint=FINGERPRINT), "address or a relay"),
        (lambda: Token.make(["cpu-0"] * 17, fingerprint=FINGERPRINT), "16 is the most"),
        (lambda: Token.make([], fingerprint=FINGERPRINT, via=RELAYED), "no further relay"),
    ],
)
def test_a_token_that_could_not_work_is_not_made(make, fact):
    with pytest.raises(ConfigError, match=fact):
        make()


def test_the_secret_is_not_in_what_a_log_would_show():
    assert TOKEN.secret.hex() not in repr(RELAYED) and repr(TOKEN.secret) not in repr(TOKEN)
