"""A host that ssh reaches: a real server of the protocol (asyncssh) on this one, for the system's own client."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def ssh_server(folder: Path, *, forwards: bool = True) -> Iterator[list[str]]:
    """A server of ssh that opens ports for those who have the key; the options with which ssh reaches it."""
    asyncssh = pytest.importorskip("asyncssh", reason="the server of this test needs the extra `test`")
    if shutil.which("ssh") is None:
        pytest.skip("there is no ssh on this host")
    host_key, user_key = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(2))
    user_key.write_private_key(folder / "key")
    (folder / "key").chmod(0o600)
    user_key.write_public_key(folder / "authorized")

    class Server(asyncssh.SSHServer):  # type: ignore[misc]
        def connection_made(self, connection: object) -> None:
            connections.append(connection)

        def server_requested(self, host: str, port: int) -> bool:
            return forwards

    loop, ready, port = asyncio.new_event_loop(), threading.Event(), 0
    connections: list[Any] = []

    async def serve() -> None:
        nonlocal port, stop
        stop = asyncio.Event()
        keys = {"server_host_keys": [host_key], "authorized_client_keys": str(folder / "authorized")}
        async with asyncssh.listen("127.0.0.1", 0, server_factory=Server, **keys) as server:
            port = server.get_port()
            ready.set()
            await stop.wait()
            for connection in connections:
                connection.abort()
            await asyncio.sleep(0.05)

    stop: asyncio.Event | None = None
    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(10)
    public = host_key.export_public_key().decode().strip()
    (folder / "known").write_text(f"[127.0.0.1]:{port} {public}\n")
    try:
        known = f"UserKnownHostsFile={folder / 'known'}"
        yield [
            "-F",
            "none",
            "-p",
            str(port),
            "-i",
            str(folder / "key"),
            "-o",
            known,
            "-o",
            "User=me",
            "-o",
            "IdentityAgent=none",
        ]
    finally:
        assert stop is not None
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


@contextmanager
def ssh_in_path(folder: Path) -> Iterator[dict[str, str]]:
    """The environment of a process whose `ssh` reaches that server, as a user's configuration would have it."""
    real = shutil.which("ssh")
    with ssh_server(folder) as options:
        programs = folder / "programs"
        programs.mkdir(exist_ok=True)
        (programs / "ssh").write_text(f'#!/bin/sh\nexec {real} {shlex.join(options)} "$@"\n')
        (programs / "ssh").chmod(0o755)
        yield os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"}
