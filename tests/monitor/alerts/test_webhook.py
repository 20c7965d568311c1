from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from trainfleet.monitor.alerts import webhook
from trainfleet.monitor.alerts.facts import Facts

FACTS = Facts(alert="loss > 5", text="loss is 7", step=3, value=7.0, run="runs/x", host="a")


@contextmanager
def site(*answers: int, to: str = "") -> Iterator[tuple[str, list[Any]]]:
    """A web server that gives these answers in turn, and what it got; `to` is where it sends elsewhere."""
    got: list[Any] = []
    left = list(answers)

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append((self.path, self.headers["Content-Type"], json.loads(body)))
            self.send_response(left.pop(0) if len(left) > 1 else left[0])
            if to:
                self.send_header("Location", to)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/secret?key=hush", got
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "pauses", lambda **kwargs: iter([0.01] * 10_000))


def test_the_facts_are_posted_as_json() -> None:
    with site(200) as (url, got):
        webhook.Webhook(url, timeout_seconds=5).post(FACTS)
    ((path, kind, body),) = got
    assert path == "/secret?key=hush" and kind == "application/json" and body == FACTS.json()


def test_what_may_pass_is_tried_again() -> None:
    with site(503, 429, 204) as (url, got):
        webhook.Webhook(url, timeout_seconds=5).post(FACTS)
    assert len(got) == 3


@pytest.mark.parametrize("code", [400, 403, 404, 410])
def test_what_will_not_pass_is_not_and_the_error_does_not_tell_the_secret(code: int) -> None:
    with site(code) as (url, got), pytest.raises(OSError, match=f"answered {code}") as caught:
        webhook.Webhook(url, timeout_seconds=5).post(FACTS)
    assert len(got) == 1 and "hush" not in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize("code", [301, 302, 307, 308])
def test_nothing_is_posted_elsewhere(code: int) -> None:
    with site(200) as (other, at_other), site(code, to=other) as (url, got):
        with pytest.raises(OSError, match=f"sends elsewhere \\({code}\\)"):
            webhook.Webhook(url, timeout_seconds=5).post(FACTS)
        assert len(got) == 1 and at_other == []


def test_nobody_there_is_tried_within_the_budget() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/hush"
        began = time.monotonic()
        with pytest.raises(OSError, match="could not be reached") as caught:
            webhook.Webhook(url, timeout_seconds=0.3).post(FACTS)
    assert 0.1 < time.monotonic() - began < 5 and "hush" not in str(caught.value)


@pytest.mark.parametrize("answer", [None, b"\x00\xff\r\n\r\n", b"HTTP/1.1 nonsense\r\n\r\n"])
def test_one_that_accepts_and_never_answers_or_with_noise_is_given_up(answer: bytes | None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stop = threading.Event()

        def accept() -> None:
            kept = []
            while not stop.is_set():
                listener.settimeout(0.05)
                try:
                    kept.append(listener.accept()[0])
                except TimeoutError:
                    continue
                if answer is not None:
                    kept[-1].sendall(answer)
                    kept[-1].close()

        thread = threading.Thread(target=accept)
        thread.start()
        began = time.monotonic()
        with pytest.raises(OSError, match=r"^http://127\.0\.0\.1:\d+ "):
            webhook.Webhook(f"http://127.0.0.1:{listener.getsockname()[1]}/x", timeout_seconds=0.4).post(FACTS)
        assert time.monotonic() - began < 5
        stop.set()
        thread.join()
