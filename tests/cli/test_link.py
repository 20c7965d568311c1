from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading

import pytest

from trainfleet.cli.main import main


def test_it_says_what_it_does_and_ends_cleanly():
    with socket.create_server(("127.0.0.1", 0)) as server:
        target = f"127.0.0.1:{server.getsockname()[1]}"
        command = [sys.executable, "-m", "trainfleet.cli.main", "link", "0", target, "--preset", "mobile"]
        process = subprocess.Popen(
            [*command, "--delay", "1ms", "--jitter", "0ms", "--cut", "5s@3b"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        alarm = threading.Timer(20, process.kill)
        alarm.start()
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            with socket.create_connection(("127.0.0.1", int(first.split(":")[1].split()[0])), timeout=10) as sock:
                accepted, _ = server.accept()
                sock.sendall(b"abc")
                assert accepted.recv(3) == b"abc"
                with pytest.raises(ConnectionResetError):
                    sock.recv(1)
                accepted.close()
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=10)
        finally:
            alarm.cancel()
            process.kill()
    assert f"leads to {target}: 1 ms one way, 13.6 Mbit/s up, 14.7 Mbit/s down, 0.0002 lost." in first
    assert out == "Ended: 1 connection, 3 bytes up, 0 bytes down, 1 reset.\n"
    assert "Connection 1 from 127.0.0.1:" in err
    assert "The link is cut: every connection is reset, for 5 s; open connections: 1." in err
    assert process.returncode == 0


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["0", "127.0.0.1:9", "--preset", "moon"], "There is no link 'moon'; presets are lan, dsl"),
        (["0", "127.0.0.1:9", "--cut", "5s"], "cut is '5s'; write how long and when"),
        (["0", "127.0.0.1:9", "--rate", "fast"], "'fast' is no rate"),
    ],
)
def test_what_cannot_be_is_refused_in_words(capsys, arguments, words):
    with pytest.raises(SystemExit) as ended:
        main(["link", *arguments])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
