from __future__ import annotations

import os
import signal
import subprocess
import sys
from datetime import timedelta

import pytest

from trainfleet.net.credentials import Credentials
from trainfleet.net.dial import dial
from trainfleet.net.listener import Listener
from trainfleet.net.token import Token

pytest.importorskip("cryptography", reason="a relay needs the extra `net`")


def start(*arguments: str) -> tuple[subprocess.Popen[str], str]:
    """The verb's process, and the token that it printed."""
    command = [sys.executable, "-m", "trainfleet.cli.main", "relay", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    first, token = process.stdout.readline(), process.stdout.readline().strip()
    assert first.startswith("Relaying at "), first + token + process.stdout.read()
    return process, token


def test_two_sides_meet_at_the_verb_and_it_ends_by_a_signal(tmp_path):
    folder = ["--folder", str(tmp_path)]
    process, token = start("--host", "127.0.0.1", "--port", "0", *folder)
    try:
        made = Credentials.make()
        with Listener(None, credentials=made, role="feeder", via=token) as listener:
            near = dial(str(listener.token()), role="trainer", timeout=timedelta(seconds=20))
            with near, listener.accept(timedelta(seconds=5)) as far:
                near.sendall(b"x")
                assert far.recv(1) == b"x"
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        last = process.stdout.read()
        assert process.wait(10) == 0
    assert last.startswith("Ended with ")

    port = Token.parse(token).addresses[0].port
    again, same = start("--host", "127.0.0.1", "--port", str(port), *folder)
    again.send_signal(signal.SIGINT)
    assert again.wait(10) == 0 and again.stdout is not None
    again.stdout.close()
    assert same == token


def test_the_token_names_the_addresses_that_were_given():
    process, token = start("--port", "0", "--address", "relay.example", "--address", "10.0.0.7:9")
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
    first, second = Token.parse(token).addresses
    assert first.host == "relay.example" and first.port > 1023 and str(second) == "10.0.0.7:9"


def test_a_port_in_use_ends_with_a_sentence():
    with Listener("127.0.0.1:0", role="feeder") as listener:
        port = str(listener.address.port)
        command = [sys.executable, "-m", "trainfleet.cli.main", "relay", "--host", "127.0.0.1", "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ)
    assert done.returncode == 2
    assert f"Port {port} of this host is in use" in done.stderr and "Traceback" not in done.stderr
