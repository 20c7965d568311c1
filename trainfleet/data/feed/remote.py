"""RemoteBatches: the stream of a rank whose batches are made by feeders on other hosts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from trainfleet.data.batches import IndexedBatches
from trainfleet.data.collate import torch_installed
from trainfleet.data.feed.feeders import Feeders
from trainfleet.data.feed.lane import Lane
from trainfleet.data.feed.terms import Terms
from trainfleet.data.order import indices_at
from trainfleet.data.sampler import Short, Span
from trainfleet.data.samples import Bad, Made
from trainfleet.errors import ConfigError
from trainfleet.net.address import Address
from trainfleet.net.credentials import Credentials
from trainfleet.net.frames import Limits
from trainfleet.net.peers import Ways
from trainfleet.net.structure import allow
from trainfleet.net.token import Token


@dataclass(kw_only=True)
class _Crew:
    """The feeders of a stream, and the terms under which they make it: another lane where those change."""

    pool: Feeders
    terms: Terms

    def open(self) -> Lane:
        return Lane(self.pool, self.terms)

    @property
    def depth(self) -> int:
        return self.pool.depth

    def make(self, span: Span) -> Made:
        raise AssertionError("feeders make the batches")


class RemoteBatches(IndexedBatches):
    """A BatchStream whose batches are made by feeders: the same samples in the same order as those of LocalBatches.

        batches = RemoteBatches(["cpu-0:7700", "cpu-1:7700"])

    A rank asks for the micro-batches that come next of whichever feeder is free. A feeder that ends, hangs or is cut
    off loses nothing: what it had is asked of the others. Its place is that of LocalBatches, (epoch, position), and
    goes into the model's checkpoint; either can go on where the other was saved.

    feeders       addresses or tokens of data services; any number, and those that come later count too
    listen        where feeders connect to, if they cannot be called: rank r listens at the port plus r
    via           token of a relay, if neither side can be reached
    tunnel        a way in to us where we listen, if we cannot be called: ssh:me@host, ngrok or cloudflared
    told          called with where we listen, with the token for feeders if there is a tunnel
    among         feeders that another stream of this process has: both share their connections
    stream        `training`, or `evaluation`: one pass in order, to be rewound
    size, seed, shuffle, short, bad    as the feeder has them, unless given
    classes       dataclasses and named tuples that batches are made of
    buffer_bytes  batches that may wait here for the loop; the feeders are asked for no more
    nearby        batches of feeders on this host come through shared memory
    timeout       how long the loop waits while no feeder is there, or none comes to another sample

    Raises PeerError when no feeder is there in time, NotAdmitted for wrong credentials or feeders that have different
    data, ConfigError for addresses that cannot be, DataError for a sample that failed.
    """

    def __init__(
        self,
        feeders: Sequence[str | Address | Token] | str | Token = (),
        *,
        listen: str | Address | None = None,
        via: Token | str | None = None,
        tunnel: str | None = None,
        told: Callable[[Address | Token], None] | None = None,
        among: Feeders | None = None,
        credentials: Credentials | None = None,
        stream: str = "training",
        size: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        seed: int | None = None,
        shuffle: bool | None = None,
        short: Short | None = None,
        bad: Bad | None = None,
        epochs: int | None = None,
        classes: Sequence[type] = (),
        pin: bool = False,
        as_numpy: bool = False,
        buffer_bytes: int = 1 << 29,
        limits: Limits | None = None,
        nearby: bool = True,
        on_skip: Callable[[int, str], None] | None = None,
        timeout: timedelta = timedelta(minutes=2),
    ) -> None:
        called = [feeders] if isinstance(feeders, str | Token) else list(feeders)
        if not called and listen is None and via is None and among is None:
            raise ConfigError("RemoteBatches needs feeders to call, an address to listen at, or a relay.")
        if tunnel is not None and listen is None:
            raise ConfigError(f"tunnel is {tunnel}, a way in to a side that listens; give listen='127.0.0.1:0' too.")
        if buffer_bytes < 1 or timeout <= timedelta(0):
            raise ConfigError(f"buffer_bytes={buffer_bytes} and timeout={timeout}; both must be more than nothing.")
        if listen is not None:
            listen = Address.parse(listen)
            listen = replace(listen, port=listen.port + rank if listen.port else 0)
        ways = Ways(
            places=called,
            listen=listen,
            via=via,
            tunnel=tunnel,
            told=told,
            credentials=credentials,
            classes=allow(*classes),
            limits=limits,
            nearby=nearby,
        )
        pool = among.share() if among is not None else Feeders(ways, timeout=timeout, buffer_bytes=buffer_bytes)
        try:
            offer = pool.offer(stream)
            terms = Terms(
                stream=stream,
                size=offer.size if size is None else size,
                rank=rank,
                world_size=world_size,
                seed=offer.seed if seed is None else seed,
                shuffle=offer.shuffle if shuffle is None else shuffle,
                short=offer.short if short is None else short,
                bad=offer.bad if bad is None else bad,
            )
            self._remote = _Crew(pool=pool, terms=terms)
            self._is_plain = offer.plain
            super().__init__(
                self._remote,
                num_samples=offer.samples,
                size=terms.size,
                rank=rank,
                world_size=world_size,
                seed=terms.seed,
                shuffle=terms.shuffle,
                short=terms.short,
                epochs=1 if stream == "evaluation" else epochs,
                name=f"the feeders' stream {stream}",
                pin=pin,
                as_numpy=as_numpy or not torch_installed(),
                on_skip=on_skip,
            )
        except BaseException:
            pool.close()
            raise

    @property
    def feeders(self) -> Feeders:
        """Those who make the batches, with what they have done so far."""
        return self._remote.pool

    def close(self) -> None:
        """Leave the feeders; may be called twice."""
        was_open = not self._closed
        super().close()
        if was_open:
            self._remote.pool.close()

    @property
    def ready(self) -> int:
        """Batches that are here and wait for the loop."""
        return self._pool.ready if isinstance(self._pool, Lane) else 0

    @property
    def digests(self) -> dict[str, str]:
        """By stream, of what the feeders' samples are."""
        return {name: offer.digest for name, offer in self.feeders.offers.items()}

    def _indices(self, positions: Any, epoch: int) -> list[int] | None:
        if not self._is_plain:
            return None
        n, seed, shuffle = self.num_samples, self.seed, self.shuffle
        found: list[int] = indices_at(positions, num_samples=n, seed=seed, epoch=epoch, shuffle=shuffle).tolist()
        return found

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        super().load_state_dict(state)
        self._remote.terms = replace(self._remote.terms, seed=self.seed)
