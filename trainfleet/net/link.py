"""A link that is slow, far, lossy or broken on purpose: a TCP proxy for tests of programs that must bear such links.

    with Link("127.0.0.1:7700", preset="mobile", seed=1) as link:
        sock = socket.create_connection(link.address)
        link.cut(timedelta(seconds=2))

It is an emulation in user space. What it holds up are the bytes of connections; the handshake of TCP is answered at
once by this host's kernel, and a lost segment is what a program can see of it: it and all behind it come late. One
thread serves all connections, and what is under way is bounded: where the far side takes no more, `send` of the near
side blocks.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from trainfleet.errors import ConfigError, PeerError
from trainfleet.net.address import Address, obstacle
from trainfleet.net.conditions import Conditions, Duration, Fault, FaultKind, Rate, conditions, duration
from trainfleet.net.crossing import Counters, Crossing, Turnstile
from trainfleet.net.loop import Door, Loop
from trainfleet.net.traffic import Traffic

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
_AGAIN_SECONDS = 0.1
_Place = tuple[socket.AddressFamily, tuple[str, int]]


class Link:
    """Listens at `listen`, and carries every connection to `target`, as `preset` or a plain wire would.

    Whatever is given beside a preset takes its place (see `conditions`): `delay` and `jitter` one way, `rate` or
    `rate_up` and `rate_down` for all connections together, `loss` a segment, `corruption` a byte. `faults` happen by
    themselves. Losses and flipped bits fall on the same bytes in every run with the same `seed`. PeerError where the
    target's name does not resolve, ConfigError where the address cannot be listened at.

    In a process whose other threads are busy in Python, pieces may come up to `sys.getswitchinterval()` (5 ms) late;
    `trainfleet link` is a process of its own.
    """

    def __init__(
        self,
        target: str | Address,
        *,
        listen: str | Address = "127.0.0.1:0",
        preset: str | None = None,
        seed: int = 0,
        faults: Sequence[Fault] = (),
        delay: Duration | None = None,
        jitter: Duration | None = None,
        rate: Rate | None = None,
        rate_up: Rate | None = None,
        rate_down: Rate | None = None,
        loss: float | None = None,
        corruption: float | None = None,
    ) -> None:
        self.conditions: Conditions = conditions(
            preset,
            delay=delay,
            jitter=jitter,
            rate=rate,
            rate_up=rate_up,
            rate_down=rate_down,
            loss=loss,
            corruption=corruption,
        )
        self._target = Address.parse(target)
        self._places = _resolve(self._target)
        self._seed = seed
        self._turnstiles = (
            Turnstile(self.conditions.bits_per_second_up),
            Turnstile(self.conditions.bits_per_second_down),
        )
        listener = _listen(Address.parse(listen))
        self.address: tuple[str, int] = listener.getsockname()[:2]
        """Where to dial instead of the target: host and port."""
        self._loop = Loop(f"link to {self._target}", at_end=self._end)
        self._traffic = Traffic(self._loop, self._turnstiles, self._passed)
        self._listener = Door(listener, self._loop)
        self._listener.on_readable = self._accept
        self._listener.ask(read=True)
        self._fault_number = 0
        self._after_bytes = [(fault.at, fault) for fault in faults if isinstance(fault.at, int)]
        self._after_bytes.sort(key=lambda pair: pair[0], reverse=True)
        for fault in faults:
            if isinstance(fault.at, timedelta):
                self._begin_at(time.monotonic() + fault.at.total_seconds(), fault)
        self._loop.start()

    def cut(self, lasts: Duration | None = None, *, gently: bool = False) -> None:
        """Reset all connections (`gently`: close them), and every new one, for that long or until `restore`."""
        self._cause("close" if gently else "cut", lasts)

    def half_open(self, lasts: Duration | None = None) -> None:
        """Swallow all bytes without a word. Connections that lost some are reset when, after it, either side sends."""
        self._cause("half_open", lasts)

    def pause(self, lasts: Duration | None = None) -> None:
        """Let nothing through, and afterwards everything: an outage that TCP bridges by sending again."""
        self._cause("pause", lasts)

    def restore(self) -> None:
        """End what is wrong with it now."""
        self._loop.call(self._restore)

    @property
    def counters(self) -> Counters:
        """A copy of them, as they are now."""
        return self._loop.call(self._traffic.count)

    def close(self) -> None:
        """Close every connection; bytes under way are lost. Returns when the thread has ended."""
        self._loop.close()

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _end(self) -> None:
        for crossing in list(self._traffic.crossings.values()):
            self._traffic.drop(crossing, reset=False)
        self._listener.close()

    # Connections.

    def _accept(self) -> None:
        try:
            sock, peer = self._listener.sock.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as exc:  # too many open files: try again a little later instead of asking in circles
            logger.warning("The link cannot take a connection: %s.", exc.strerror)
            self._listener.ask(read=False)
            self._loop.at(time.monotonic() + _AGAIN_SECONDS, lambda: self._listener.ask(read=True))
            return
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._traffic.counters.connections += 1
        crossing = Crossing(number=self._traffic.counters.connections, client=Door(sock, self._loop))
        self._traffic.crossings[crossing.number] = crossing
        logger.info("Connection %d from %s:%d.", crossing.number, *peer[:2])
        if self._traffic.state in ("cut", "close"):
            self._traffic.drop(crossing, reset=self._traffic.state == "cut")
        elif self._traffic.state == "half_open":
            crossing.has_lost_bytes = True
            crossing.client.on_readable = lambda: self._hear_lost(crossing)
            crossing.client.ask(read=True)
        else:
            self._connect(crossing, list(self._places))

    def _connect(self, crossing: Crossing, places: list[_Place]) -> None:
        """Try the target's addresses in turn, without waiting here."""
        family, place = places.pop(0)
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        door = crossing.target = Door(sock, self._loop)
        settled = False

        def settle() -> None:
            """The kernel has an answer, or its time is over."""
            nonlocal settled
            if settled or not crossing.is_open:
                return
            settled = True
            if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) and _is_connected(sock):
                door.ask(write=False)
                crossing.join(door, self.conditions, self._turnstiles, self._seed)
                self._traffic.join(crossing)
                return
            door.close(reset=True)
            crossing.target = None
            if places:
                self._connect(crossing, places)
                return
            self._traffic.counters.refused += 1
            logger.info("Connection %d is reset: %s does not answer.", crossing.number, self._target)
            self._traffic.drop(crossing, reset=True)

        sock.connect_ex(place)
        door.on_writable = settle
        door.ask(write=True)
        self._loop.at(time.monotonic() + CONNECT_SECONDS, settle)

    def _hear_lost(self, crossing: Crossing) -> None:
        """From one that came while the link was half-open, and never reached the target."""
        try:
            piece = crossing.client.sock.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        self._traffic.counters.swallowed_bytes += len(piece)
        if not piece or self._traffic.state != "half_open":
            self._traffic.drop(crossing, reset=True)

    # Faults.

    def _cause(self, kind: FaultKind, lasts: Duration | None) -> None:
        fault = Fault(kind=kind, at=0, lasts=None if lasts is None else duration(lasts))
        self._loop.call(lambda: self._begin(fault))

    def _begin_at(self, when: float, fault: Fault) -> None:
        self._loop.at(when, lambda: self._begin(fault))

    def _passed(self, num_bytes: int) -> None:
        while self._after_bytes and self._after_bytes[-1][0] <= num_bytes:
            # Not now: whoever counts is in the middle of a delivery.
            self._begin_at(time.monotonic(), self._after_bytes.pop()[1])

    def _begin(self, fault: Fault) -> None:
        self._restore()
        traffic = self._traffic
        traffic.state = fault.kind
        traffic.counters.faults += 1
        until = "until it is restored" if fault.lasts is None else f"for {fault.lasts.total_seconds():g} s"
        logger.info("The link %s %s; open connections: %d.", _WORDS[fault.kind], until, len(traffic.crossings))
        if fault.kind == "half_open":
            traffic.swallow()
        elif fault.kind == "pause":
            self._listener.hold(held=True)
            traffic.hold(held=True)
        else:
            for crossing in list(traffic.crossings.values()):
                traffic.drop(crossing, reset=fault.kind == "cut")
        if fault.lasts is not None:
            self._loop.at(time.monotonic() + fault.lasts.total_seconds(), self._restore_if(self._fault_number))

    def _restore_if(self, number: int) -> Callable[[], None]:
        """End the fault of that number, unless it has ended and another has begun."""
        return lambda: self._restore() if number == self._fault_number else None

    def _restore(self) -> None:
        state, self._traffic.state = self._traffic.state, None
        self._fault_number += 1
        if state is not None:
            logger.info("The link is as before.")
        if state == "pause":
            self._listener.hold(held=False)
            self._traffic.hold(held=False)


_WORDS: dict[FaultKind, str] = {
    "cut": "is cut: every connection is reset,",
    "close": "is closed: every connection is closed,",
    "half_open": "is half-open: it swallows every byte,",
    "pause": "pauses",
}


def _resolve(target: Address) -> list[_Place]:
    try:
        found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except OSError as exc:
        raise PeerError(f"The link cannot lead to {target}: {obstacle(exc)}") from exc
    return [(family, (str(place[0]), int(place[1]))) for family, _, _, _, place in found]


def _listen(address: Address) -> socket.socket:
    family, place = address.resolve()
    try:
        return socket.create_server(place, family=family, backlog=512)
    except OSError as exc:
        raise ConfigError(
            f"The link cannot listen at {address}: {(exc.strerror or str(exc)).lower()}.",
            hint="Another program may have that port; `trainfleet doctor ports` finds free ones.",
        ) from exc


def _is_connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True
