"""ssh is the real client against a real server of the protocol (asyncssh); ngrok and cloudflared are stand-ins."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from free_ports import free_port
from ssh_host import ssh_server

from trainfleet.errors import ConfigError, DependencyError, PeerError
from trainfleet.net.address import Address
from trainfleet.net.dial import dial
from trainfleet.net.listener import Listener
from trainfleet.net.tunnel import KINDS, enter_tunnel, leave_tunnels, near_end, open_tunnel

pytestmark = pytest.mark.usefixtures("leaves_nothing")

SOON = timedelta(seconds=10)


@pytest.mark.parametrize(("at_host", "asks"), [(False, False), (True, False), (False, True)])
def test_through_ssh_the_other_side_dials_a_host_between(tmp_path, made, at_host, asks):
    with (
        ssh_server(tmp_path) as options,
        Listener("127.0.0.1:0", credentials=made, role="feeder") as listener,
    ):
        far_port = free_port() if asks else 0
        tunnel = open_tunnel(
            "ssh", listener.address.port, host="127.0.0.1", far_port=far_port, ssh_options=options, at_host=at_host
        )
        assert tunnel.is_open and tunnel.address.host == "127.0.0.1"
        assert tunnel.address.port not in (listener.address.port, 0) and far_port in (0, tunnel.address.port)
        near = dial(str(listener.token([tunnel.address])), role="trainer", timeout=SOON)
        with near, listener.accept(SOON) as far:
            near.sendall(b"x")
            assert far.recv(1) == b"x"
        tunnel.close()
    assert not tunnel.is_open


def test_ssh_says_which_port_it_could_not_open(tmp_path, made):
    with (
        ssh_server(tmp_path, forwards=False) as options,
        pytest.raises(PeerError, match=r"127\.0\.0\.1 opens no port 7700 for us: .*forwarding failed") as raised,
    ):
        open_tunnel("ssh", 1, host="127.0.0.1", far_port=7700, ssh_options=options)
    assert "AllowTcpForwarding" in str(raised.value.hint)


def test_ssh_that_does_not_get_in_is_a_sentence(tmp_path):
    with ssh_server(tmp_path) as options:
        stranger = pytest.importorskip("asyncssh").generate_private_key("ssh-ed25519")
        (tmp_path / "key").unlink()
        stranger.write_private_key(tmp_path / "key")
        (tmp_path / "key").chmod(0o600)
        with pytest.raises(PeerError, match=r"ssh does not reach 127\.0\.0\.1: .*Permission denied") as raised:
            open_tunnel("ssh", 1, host="127.0.0.1", ssh_options=options)
    assert "without asking for anything" in str(raised.value.hint)


def test_a_lost_tunnel_is_said(tmp_path, made, caplog):
    with ssh_server(tmp_path) as options:
        tunnel = open_tunnel("ssh", 1, host="127.0.0.1", ssh_options=options, at_host=True)
    ends = time.monotonic() + 5
    while not caplog.messages and time.monotonic() < ends:
        time.sleep(0.02)
    assert not tunnel.is_open
    assert "ssh has ended, and nobody can come in that way any more" in caplog.messages[-1]
    tunnel.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_program_is_a_sentence_with_its_remedy(kind, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "pyngrok.ngrok", None)
    monkeypatch.setitem(sys.modules, "pyngrok", None)
    with pytest.raises(DependencyError) as raised:
        open_tunnel(kind, 7700, host="me@example.org")
    said = f"{raised.value} {raised.value.hint}"
    assert kind in said and "nstall" in said


def test_what_is_no_tunnel_is_refused():
    with pytest.raises(ConfigError, match="no tunnel 'frp'; there are ssh, ngrok, cloudflared"):
        open_tunnel("frp", 7700)
    for host in (None, "-oProxyCommand=rm"):
        with pytest.raises(ConfigError, match="needs a host"):
            open_tunnel("ssh", 7700, host=host)
    with pytest.raises(ConfigError, match="dial it as it is"):
        enter_tunnel(Address("cpu-0"))


def stand_in(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of that name in PATH that behaves as far as the test needs; it is not the real one."""
    path = folder / name
    path.write_text(f"#!{sys.executable} -u\n{text}")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


CLOUDFLARED = """
import pathlib, socket, sys, threading, time
target = pathlib.Path(__file__).with_name("target")
def copy(one, other):
    while part := one.recv(65536):
        other.sendall(part)
    other.shutdown(socket.SHUT_WR)
if sys.argv[1] == "tunnel":
    target.write_text(sys.argv[-1].rpartition(":")[2])
    print("INF Requesting new quick Tunnel on trycloudflare.com...")
    print("INF |  https://one-two-three.trycloudflare.com  |")
    assert sys.argv[-1].startswith("tcp://127.0.0.1:")
else:
    assert sys.argv[1:4] == ["access", "tcp", "--hostname"] and sys.argv[4] == "one-two-three.trycloudflare.com"
    time.sleep(0.2)
    listening = socket.create_server(("127.0.0.1", int(sys.argv[-1].rpartition(":")[2])))
    while True:
        near, far = listening.accept()[0], socket.create_connection(("127.0.0.1", int(target.read_text())))
        for pair in ((near, far), (far, near)):
            threading.Thread(target=copy, args=pair, daemon=True).start()
time.sleep(60)
"""


def test_a_tunnel_by_cloudflared_has_a_program_at_both_ends(tmp_path, monkeypatch):
    stand_in(tmp_path, "cloudflared", CLOUDFLARED, monkeypatch)
    with open_tunnel("cloudflared", 7700) as tunnel:
        assert tunnel.address == Address("one-two-three.trycloudflare.com", 443)
        with enter_tunnel(tunnel.address) as entered:
            assert entered.address.is_loopback and entered.is_open
        assert not entered.is_open and tunnel.is_open


def test_a_token_with_a_tunnel_by_cloudflared_is_dialled_as_any_other(tmp_path, monkeypatch, made):
    stand_in(tmp_path, "cloudflared", CLOUDFLARED, monkeypatch)
    with (
        Listener("127.0.0.1:0", credentials=made, role="feeder") as listener,
        open_tunnel("cloudflared", listener.address.port) as tunnel,
    ):
        assert near_end(listener.address) == listener.address
        token = str(listener.token([tunnel.address]))
        entered = near_end(tunnel.address)
        for _ in range(2):
            with dial(token, role="trainer", timeout=SOON) as near, listener.accept(SOON) as far:
                near.sendall(b"x")
                assert far.recv(1) == b"x" and near_end(tunnel.address) == entered, "one program serves all"
        leave_tunnels()


def test_a_cloudflared_that_fails_is_a_sentence_with_its_last_words(tmp_path, monkeypatch):
    stand_in(tmp_path, "cloudflared", "print('failed to request quick Tunnel: no such host')", monkeypatch)
    with pytest.raises(PeerError, match="cloudflared ended: failed to request quick Tunnel"):
        open_tunnel("cloudflared", 7700)
    with pytest.raises(PeerError, match="cloudflared has ended: failed to request"):
        enter_tunnel(Address("one-two-three.trycloudflare.com", 443))


NGROK = """
import http.server, json, sys
OPEN = {}
class Agent(http.server.BaseHTTPRequestHandler):
    def answer(self, code, value):
        body = json.dumps(value).encode() if code != 204 else b""
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.answer(200, {"endpoints": list(OPEN.values()), "tunnels": list(OPEN.values()), "uri": self.path})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if FAILS:
            return self.answer(502, {"msg": "ERR_NGROK_8013"})
        port = asked["upstream"]["url"].rpartition(":")[2]
        OPEN[asked["name"]] = {"name": asked["name"], "url": f"tcp://127.0.0.1:{port}", "uri": self.path}
        self.answer(201, OPEN[asked["name"]])
    def do_DELETE(self):
        OPEN.clear()
        self.answer(204, None)
    def log_message(self, *_):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Agent)
print(f't=1 lvl=info msg="starting web service" obj=web addr=127.0.0.1:{server.server_port}')
print('t=1 lvl=info msg="tunnel session started" obj=tunnels.session')
print('t=1 lvl=info msg="client session established" obj=csess')
server.serve_forever()
"""


@pytest.mark.parametrize("fails", [False, True])
def test_a_tunnel_by_ngrok_is_opened_by_pyngrok(tmp_path, monkeypatch, made, fails):
    conf = pytest.importorskip("pyngrok.conf", reason="ngrok needs the extra `ngrok`")
    monkeypatch.setattr(conf, "DEFAULT_NGROK_PATH", str(tmp_path / "missing"))
    monkeypatch.setattr(conf, "DEFAULT_CONFIG_PATH", str(tmp_path / "ngrok.yml"))
    monkeypatch.delenv("PYNGROK_NGROK_PATH", raising=False)
    stand_in(tmp_path, "ngrok", f"FAILS = {fails}\n{NGROK}", monkeypatch)
    with Listener("127.0.0.1:0", credentials=made, role="feeder") as listener:
        if fails:
            with pytest.raises(PeerError, match=r"ngrok opens no tunnel: .*502") as raised:
                open_tunnel("ngrok", listener.address.port)
            assert "add-authtoken" in str(raised.value.hint)
            return
        with open_tunnel("ngrok", listener.address.port) as tunnel:
            near = dial(listener.token([tunnel.address]), role="trainer", timeout=SOON)
            with near, listener.accept(SOON) as far:
                near.sendall(b"x")
                assert far.recv(1) == b"x"
        assert not tunnel.is_open
        tunnel.close()
