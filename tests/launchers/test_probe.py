"""A host says what is so: its clock, its versions, its names, its ports."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

from trainfleet.launchers.probe import Probe, probe


def test_it_says_what_is_so(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("")
    found = probe("127.0.0.1", 1, str(recipe), listens=False)
    assert found.hostname == socket.gethostname()
    assert abs(found.time - time.time()) < 5
    assert found.versions["python"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert found.knows_first and found.recipe and found.port_is_free
    found = probe("nowhere.invalid", 1, str(tmp_path / "none"), listens=False)
    assert not found.knows_first and not found.recipe


def test_a_port_that_is_in_use_is_not_free() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        assert not probe("127.0.0.1", port, "", listens=True).port_is_free
        assert probe("127.0.0.1", port, "", listens=False).port_is_free  # nobody asked
    assert probe("127.0.0.1", port, "", listens=True).port_is_free


def test_as_a_program_it_says_one_line_and_needs_no_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "trainfleet.launchers.probe", "127.0.0.1", "1", "none"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert Probe(**json.loads(done.stdout)).knows_first
    assert "| torch\n" not in done.stderr and "numpy" not in done.stderr
