"""Ways in for a side that nobody can dial, by programs and services of others: ssh, ngrok, cloudflared.

What goes through them is TLS between the two sides, as through a relay: none of them can read it.
"""

from __future__ import annotations

import atexit
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

from trainfleet.deps import require
from trainfleet.errors import ConfigError, DependencyError, PeerError
from trainfleet.net.address import Address, obstacle
from trainfleet.net.program import Program
from trainfleet.net.retry import wait_for

Kind = Literal["ssh", "ngrok", "cloudflared"]
KINDS: tuple[Kind, ...] = ("ssh", "ngrok", "cloudflared")
_REACH_SECONDS = 10.0
_END_SECONDS = 10.0

_SSH_OPTIONS = (
    "BatchMode=yes",  # nobody is there to answer a question
    "ExitOnForwardFailure=yes",
    "ConnectTimeout=15",
    "ServerAliveInterval=15",
    "ServerAliveCountMax=3",
    "ControlMaster=no",  # a shared connection would keep the tunnel after we are gone
    "ControlPath=none",
)
_SSH_NOISE = ("debug", "OpenSSH_", "Transferred: ", "Bytes per second: ", "Authenticated to ")
_CLOUDFLARED = ".trycloudflare.com"
_NO_SSH = "Install an ssh client, such as `apt install openssh-client`."
_NO_CLOUDFLARED = "Install it on both sides, from Cloudflare's page of downloads; no account is needed."


@dataclass(frozen=True, slots=True)
class Tunnel:
    """Open until `close`."""

    address: Address
    """What the other side dials: the listener's token names it."""
    _close: Callable[[], None]
    _is_open: Callable[[], bool]

    @property
    def is_open(self) -> bool:
        """Whether its program still runs; the log says when it ends."""
        return self._is_open()

    def close(self) -> None:
        """May be called twice."""
        self._close()

    def __enter__(self) -> Tunnel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_tunnel(
    kind: Kind | str,
    port: int,
    *,
    host: str | None = None,
    far_port: int = 0,
    at_host: bool = False,
    ssh_options: Sequence[str] = (),
    timeout: timedelta = timedelta(seconds=30),
) -> Tunnel:
    """A way in to `port` of our loopback, ready to be dialled.

    ssh: `host` is one of yours that the other side can reach, such as `me@example.org` or a name of your ssh
    configuration; `far_port` there, 0 for a free one. `at_host`: the other side runs on that very host, and dials its
    loopback. `ssh_options` such as `["-p", "2222"]`. ngrok needs its token set up, cloudflared a program on both sides
    (`enter_tunnel`).
    DependencyError where a program is missing; PeerError with its last words where it opens nothing.
    """
    seconds = timeout.total_seconds()
    if kind == "ssh":
        if not host or host.startswith("-"):
            raise ConfigError("A tunnel by ssh needs a host that the other side can reach, such as me@example.org.")
        return _open_ssh(port, host, far_port, at_host=at_host, options=ssh_options, seconds=seconds)
    if kind == "ngrok":
        return _open_ngrok(port)
    if kind == "cloudflared":
        return _open_cloudflared(port, seconds)
    raise ConfigError(f"There is no tunnel {kind!r}; there are {', '.join(KINDS)}.")


def _open_ssh(port: int, host: str, far_port: int, *, at_host: bool, options: Sequence[str], seconds: float) -> Tunnel:
    forward = f"{'127.0.0.1' if at_host else '*'}:{far_port}:127.0.0.1:{port}"
    ours = [word for option in _SSH_OPTIONS for word in ("-o", option)]
    # Of a port that was asked for ssh says only with -v that it has been opened.
    command = ["ssh", *(["-v"] if far_port else []), "-N", "-T", *ours, *options, "-R", forward, "--", host]
    program = Program(command, remedy=_NO_SSH, noise=_SSH_NOISE)
    opens = r"remote forward success for: listen" if far_port else r"Allocated port (\d+) for remote forward"
    try:
        found = program.find(opens, seconds)
    except PeerError as exc:
        if "forwarding failed" in str(exc):
            raise PeerError(
                f"{host} opens no port {far_port or ''} for us: {program.last_words}",
                hint="The port may be in use there: 0 takes a free one. Or its sshd has `AllowTcpForwarding no`.",
            ) from exc
        raise PeerError(
            f"ssh does not reach {host}: {program.last_words}",
            hint=f"`ssh -o BatchMode=yes {host} true` has to succeed without asking for anything.",
        ) from exc
    opened = far_port or int(found[1])
    address = Address("127.0.0.1" if at_host else _host_name(host, options), opened)
    if not at_host:
        try:
            _reach(address)
        except PeerError:
            program.close()
            raise
    return Tunnel(address, program.close, lambda: program.is_running)


def _host_name(host: str, options: Sequence[str]) -> str:
    """What `host` stands for in the user's configuration of ssh."""
    asked = subprocess.run(["ssh", *options, "-G", "--", host], capture_output=True, text=True, timeout=10)
    names = [line.split(None, 1)[1] for line in asked.stdout.splitlines() if line.startswith("hostname ")]
    return names[0] if names else host.rpartition("@")[2]


def _reach(address: Address) -> None:
    """PeerError unless the far end answers from here, as it would to others."""
    ends = time.monotonic() + _REACH_SECONDS
    try:
        socket.create_connection((address.host, address.port), timeout=ends - time.monotonic()).close()
    except OSError as exc:
        raise PeerError(
            f"ssh has opened {address}, but it cannot be reached from here: {obstacle(exc)}",
            hint="Its sshd opens ports to others with `GatewayPorts clientspecified`, and its firewall has to pass "
            "them. Where the other side runs on that host, say so: at_host=True.",
        ) from exc


def _open_ngrok(port: int) -> Tunnel:
    ngrok = require("pyngrok.ngrok", "ngrok", purpose="A tunnel by ngrok")
    errors = require("pyngrok.exception", "ngrok")
    settings = require("pyngrok.conf", "ngrok").PyngrokConfig(start_new_session=True)
    if not Path(settings.ngrok_path).exists():  # else it would be downloaded
        settings.ngrok_path = shutil.which("ngrok") or settings.ngrok_path
    try:
        opened = ngrok.connect(str(port), "tcp", pyngrok_config=settings)
    except (errors.PyngrokNgrokInstallError, errors.PyngrokSecurityError) as exc:
        raise DependencyError(
            f"The program of ngrok cannot be installed: {_first_line(exc)}",
            hint="Install it yourself, where PATH finds it, from ngrok's page of downloads.",
        ) from exc
    except errors.PyngrokError as exc:
        ngrok.kill(settings)
        raise PeerError(
            f"ngrok opens no tunnel: {_first_line(exc)}",
            hint="It needs an account: `ngrok config add-authtoken TOKEN`; and one that may open endpoints of TCP.",
        ) from exc
    process = ngrok.get_ngrok_process(settings).proc

    def close() -> None:
        if process.poll() is not None:
            return
        ngrok.disconnect(opened.public_url, settings)
        if not ngrok.get_tunnels(settings):  # another one of ours may go through the same process
            ngrok.kill(settings)
            process.wait(_END_SECONDS)

    return Tunnel(Address.parse(opened.public_url.removeprefix("tcp://")), close, lambda: process.poll() is None)


def _open_cloudflared(port: int, seconds: float) -> Tunnel:
    command = ["cloudflared", "tunnel", "--no-autoupdate", "--url", f"tcp://127.0.0.1:{port}"]
    program = Program(command, remedy=_NO_CLOUDFLARED)
    name = program.find(r"https://([a-z0-9-]+\.trycloudflare\.com)", seconds)[1]
    return Tunnel(Address(name, 443), program.close, lambda: program.is_running)


def enter_tunnel(address: Address, *, timeout: timedelta = timedelta(seconds=30)) -> Tunnel:
    """The other end of a tunnel by cloudflared: its `address` is one of our loopback, to be dialled in place of that.

    ssh and ngrok need nothing of the kind: their addresses are dialled as they are.
    """
    if not address.host.endswith(_CLOUDFLARED):
        raise ConfigError(f"{address} is not the address of a tunnel by cloudflared; dial it as it is.")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        local = Address("127.0.0.1", int(free.getsockname()[1]))
    command = ["cloudflared", "access", "tcp", "--hostname", address.host, "--url", str(local)]
    program = Program(command, remedy=_NO_CLOUDFLARED)

    def attempt(left: float) -> None:
        try:
            socket.create_connection((local.host, local.port), timeout=left).close()
        except OSError as exc:
            if program.has_ended.is_set():
                raise PeerError(f"cloudflared has ended: {program.last_words}") from exc
            raise PeerError("It does not listen yet.") from exc

    try:
        wait_for("cloudflared", attempt, timeout=timeout, closing=program.has_ended)
    except BaseException:
        program.close()
        raise
    return Tunnel(local, program.close, lambda: program.is_running)


def refuse_without_program(address: Address) -> None:
    """DependencyError where a tunnel by cloudflared leads to `address`, and that program is not on this host."""
    if address.host.endswith(_CLOUDFLARED) and shutil.which("cloudflared") is None:
        raise DependencyError(
            f"The way to {address.host} is a tunnel by cloudflared, and there is no cloudflared on this host.",
            hint=_NO_CLOUDFLARED,
        )


_entered: dict[Address, Tunnel] = {}
_entering = threading.Lock()


def near_end(address: Address, *, timeout: timedelta = timedelta(seconds=30)) -> Address:
    """What to dial for `address`: itself, or our end of a tunnel by cloudflared, which stays while this process does.

    Raises as `enter_tunnel` does.
    """
    if not address.host.endswith(_CLOUDFLARED):
        return address
    with _entering:
        tunnel = _entered.get(address)
        if tunnel is None or not tunnel.is_open:
            tunnel = _entered[address] = enter_tunnel(address, timeout=timeout)
        return tunnel.address


@atexit.register
def leave_tunnels() -> None:
    """End our ends of tunnels by cloudflared."""
    with _entering:
        while _entered:
            _entered.popitem()[1].close()


def _first_line(exc: Exception) -> str:
    lines = str(exc).strip().splitlines()
    return (lines[0] if lines else type(exc).__name__).rstrip(".") + "."
