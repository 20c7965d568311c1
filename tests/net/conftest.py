"""Fixtures of tests of the network."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from left_behind import nothing_left_behind

from trainfleet.net.credentials import Credentials


@pytest.fixture(scope="session")
def made() -> Credentials:
    """Credentials of a side that listens, made on the spot."""
    pytest.importorskip("cryptography", reason="identities need the extra `net`")
    return Credentials.make()


@pytest.fixture
def leaves_nothing() -> Iterator[None]:
    with nothing_left_behind():
        yield
