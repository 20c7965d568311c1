"""What stands and serves says where it is, and in a terminal how it goes, without getting in the way of the log."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from trainfleet.cli.standing import LiveLine, credentials_for, ends_by_signal, reached_by, stand, tell_place
from trainfleet.net.credentials import Credentials
from trainfleet.net.listener import Listener
from trainfleet.net.token import Token


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_live_line_makes_way_for_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    with LiveLine(lambda seconds: f"how it goes {seconds > 0}") as line:
        line.refresh()
        print("a word of the log", file=sys.stderr)
        line.refresh()
    assert terminal.getvalue().count("\033[Khow it goes True") == 2
    assert "\033[Ka word of the log" in terminal.getvalue() and terminal.getvalue().endswith("\033[K")
    assert sys.stderr is terminal


def test_elsewhere_a_plain_line_comes_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr", plain := io.StringIO())
    monkeypatch.setattr("trainfleet.cli.standing._PLAIN_SECONDS", 0.2)
    texts = iter(["one", "two", "three", "three", "three", "four"])
    with LiveLine(lambda seconds: next(texts)) as line:
        for pause in (0.0, 0.25, 0.25, 0.25, 0.0, 0.25):
            time.sleep(pause)
            line.refresh()
    assert plain.getvalue() == "" and capsys.readouterr().out == "two\nthree\nfour\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_stands_until_a_signal(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainfleet.cli.standing._REFRESH_SECONDS", 0.02)
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    try:
        ending = ends_by_signal()
        threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
        begun = time.monotonic()
        stand(ending, lambda seconds: "how it goes")
        assert 0.1 < time.monotonic() - begun < 5 and "how it goes" in terminal.getvalue()
    finally:
        for each, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(each, handler)


class Service:
    def __init__(self, address: str | None, credentials: Credentials | None = None) -> None:
        self.credentials = credentials or Credentials()
        self.listener = None if address is None else Listener(address, credentials=credentials, role="standing")


def test_it_says_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    service = Service("127.0.0.1:0")
    assert service.listener is not None
    with service.listener as listener:
        tell_place(service, ["gpu-0"], ["cpu-0:7700", "tf1_" + "a" * 100])
        assert reached_by(service, []) == str(listener.address)
        assert reached_by(service, ["a", "b:1"]) == f"a:{listener.address.port} --feed b:1"
        said = capsys.readouterr().out
    assert f"listens at  {listener.address}\ncalled      gpu-0\n" in said and "only this host can connect" in said
    assert said.startswith("calls       cpu-0:7700\ncalls       tf1_aaaaaaaa…\n")
    tell_place(Service(None), [], [])
    assert capsys.readouterr().out == ""


def test_off_loopback_there_is_a_secret_that_a_folder_keeps(tmp_path: Path) -> None:
    assert (
        credentials_for("127.0.0.1:7700", None, None, None) is None and credentials_for(None, None, None, None) is None
    )
    pytest.importorskip("cryptography", reason="identities need the extra `net`")
    made = credentials_for("0.0.0.0:7700", None, None, None)
    assert made is not None and made.secret is not None
    kept = [credentials_for("127.0.0.1:7700", None, tmp_path / "kept", None) for _ in range(2)]
    assert kept[0] is not None and kept[1] is not None and kept[0].secret == kept[1].secret
    service = Service("127.0.0.1:0", kept[0])
    assert service.listener is not None
    with service.listener:
        token = Token.parse(reached_by(service, ["gpu-0:9"]))
    assert token.secret == kept[0].secret and str(token.addresses[0]) == "gpu-0:9"
