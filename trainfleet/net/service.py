"""`Service`: what stands and serves guests, from `open` until it is closed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Generic

from trainfleet.net.address import Address
from trainfleet.net.credentials import Credentials
from trainfleet.net.guests import Guests, V
from trainfleet.net.listener import Listener
from trainfleet.net.reception import Reception
from trainfleet.net.token import Token

if TYPE_CHECKING:
    from typing_extensions import Self


class Service(Generic[V]):
    """A reception and the guests that it lets in. A subclass says what it needs for them: `_begin`, `_end`."""

    def __init__(self, guests: Guests[V], reception: Reception) -> None:
        self.guests, self.reception = guests, reception

    def _begin(self) -> None:
        """Get ready, before anybody comes."""

    def _end(self) -> None:
        """Give up what was got; nobody is served any more. Called after a `_begin` that failed too, and twice."""

    def open(self) -> Self:
        """Returns once it listens. Raises what `Reception` raises, with nothing left open."""
        try:
            self._begin()
            self.reception.open()
        except BaseException:
            self.close()
            raise
        return self

    def serve(self) -> None:
        """Until it is closed, or Ctrl-C is pressed."""
        with self.open(), suppress(KeyboardInterrupt):
            self.reception.closing.wait()

    def close(self) -> None:
        """End all connections; what was asked here is asked of others. May be called twice."""
        self.reception.stop()
        self.guests.close()
        self._end()
        self.reception.close()

    @property
    def address(self) -> Address:
        """Where it listens, with the port that was chosen for port 0."""
        return self.reception.address

    @property
    def listener(self) -> Listener | None:
        return self.reception.listener

    @property
    def credentials(self) -> Credentials:
        return self.reception.credentials

    def token(self, addresses: Sequence[str | Address] = ()) -> Token:
        """What a guest needs to come in; `addresses`: as it calls this host."""
        return self.reception.token(addresses)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
