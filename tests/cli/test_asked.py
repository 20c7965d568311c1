"""Which model is meant is one thing, said once."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainfleet.cli.asked import Asked
from trainfleet.errors import ConfigError

NOTHING = {"feeders": (), "listen": None, "folder": None, "certs": None, "weights": None, "device": None}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"feeders": ["a:1"], "listen": "127.0.0.1:0"}, "--feed calls"),
        ({"feeders": ["a:1"], "weights": "w"}, "--weights is for `trainfleet gpu-service`"),
        ({"listen": "127.0.0.1:0", "device": "cpu"}, "--device is for"),
        ({"certs": Path("c")}, "--certs is for --feed"),
        ({"folder": Path("f"), "feeders": ["a:1"]}, "--folder is for --listen"),
    ],
)
def test_options_that_do_not_go_together_are_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        Asked(**{**NOTHING, **given})


@pytest.mark.parametrize("given", [{}, {"weights": "w", "device": "cpu"}])
def test_a_model_of_this_host_is_asked_without_a_network(given):
    assert not Asked(**{**NOTHING, **given}).is_remote


@pytest.mark.parametrize("given", [{"feeders": ["a:1"], "certs": Path("c")}, {"listen": "b:1", "folder": Path("f")}])
def test_services_are_called_or_call(given):
    assert Asked(**{**NOTHING, **given}).is_remote
