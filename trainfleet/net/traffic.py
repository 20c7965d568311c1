"""Bytes through an emulated link: in at once or in turn, out when they are due, never more under way than allowed."""

from __future__ import annotations

import dataclasses
import itertools
import socket
import time
from collections.abc import Callable

from trainfleet.net.conditions import FaultKind
from trainfleet.net.crossing import Counters, Crossing, Flow, Turnstile
from trainfleet.net.lane import End
from trainfleet.net.loop import EARLY_SECONDS, Loop


class Traffic:
    """All crossings of a link, in the thread of `loop`; `passed` is told how many bytes went through."""

    def __init__(self, loop: Loop, turnstiles: tuple[Turnstile, Turnstile], passed: Callable[[int], None]) -> None:
        self._loop = loop
        self._turnstiles = turnstiles
        self._passed = passed
        self.counters = Counters()
        self.crossings: dict[int, Crossing] = {}
        self.state: FaultKind | None = None
        """What is wrong with the link now."""

    def join(self, crossing: Crossing) -> None:
        """Both ends are there; listen to them."""
        for flow in crossing.flows:
            flow.source.on_readable = lambda flow=flow: self._readable(flow)  # type: ignore[misc]
            flow.sink.on_writable = lambda flow=flow: self._writable(flow)  # type: ignore[misc]
            flow.source.ask(read=True)

    def drop(self, crossing: Crossing, *, reset: bool) -> None:
        """Close both ends; what is under way is lost."""
        if not crossing.is_open:
            return
        crossing.is_open = False
        for door in crossing.doors():
            door.close(reset=reset)
        del self.crossings[crossing.number]
        self.counters.reset += reset
        for flow in crossing.flows:
            self.counters.lost_segments += flow.lane.lost_segments
            self.counters.flipped_bits += flow.lane.flipped_bits

    def swallow(self) -> None:
        """Lose what is under way."""
        for crossing in self.crossings.values():
            for flow in crossing.flows:
                crossing.has_lost_bytes |= flow.lane.next_due() is not None
                self.counters.swallowed_bytes += flow.lane.forget()
                if flow.is_full:
                    flow.is_full = False
                    flow.source.ask(read=True)

    def hold(self, *, held: bool) -> None:
        """Let nothing in or out; afterwards, all that has become due."""
        for crossing in list(self.crossings.values()):
            for door in crossing.doors():
                door.hold(held=held)
            if not held:
                for flow in crossing.flows:
                    self._arrange(flow)
        if not held:
            for turnstile in self._turnstiles:
                self._let_in(turnstile)

    def count(self) -> Counters:
        counters = dataclasses.replace(self.counters, open_connections=len(self.crossings))
        for flow in itertools.chain.from_iterable(crossing.flows for crossing in self.crossings.values()):
            counters.lost_segments += flow.lane.lost_segments
            counters.flipped_bits += flow.lane.flipped_bits
        return counters

    # In.

    def _readable(self, flow: Flow) -> None:
        if not flow.turnstile.limits:
            self._read(flow)
            return
        flow.source.ask(read=False)
        self._queue(flow)

    def _queue(self, flow: Flow) -> None:
        if not flow.waits:
            flow.waits = True
            flow.turnstile.waiting.append(flow)
            self._let_in(flow.turnstile)

    def _let_in(self, turnstile: Turnstile) -> None:
        while turnstile.waiting and self.state != "pause":
            opens = turnstile.bottleneck.open_at()
            if opens > time.monotonic():
                if not turnstile.alarm_is_set:
                    turnstile.alarm_is_set = True
                    self._loop.at(opens, lambda: self._reopen(turnstile))
                return
            flow = turnstile.waiting.popleft()
            flow.waits = False
            if flow.crossing.is_open and self._read(flow):
                flow.waits = True
                turnstile.waiting.append(flow)

    def _reopen(self, turnstile: Turnstile) -> None:
        turnstile.alarm_is_set = False
        self._let_in(turnstile)

    def _read(self, flow: Flow) -> bool:
        """Take one slice from the source; True where it was a whole one and the turnstile should ask again."""
        if flow.ended:
            return False
        if not flow.lane.has_room():
            flow.is_full = True
            flow.source.ask(read=False)
            return False
        wanted = flow.lane.slice_bytes()
        try:
            piece = flow.source.sock.recv(wanted)
        except BlockingIOError:
            flow.source.ask(read=True)
            return False
        except OSError:
            self._last(flow, End.RESET)
            return False
        if flow.crossing.has_lost_bytes and self.state != "half_open":
            self.drop(flow.crossing, reset=True)
        elif not piece:
            self._last(flow, End.CLOSED)
        else:
            self._take(flow, piece, is_whole=len(piece) == wanted)
            if flow.crossing.is_open:
                again = len(piece) == wanted and flow.turnstile.limits
                flow.source.ask(read=not again)
                return again
        return False

    def _take(self, flow: Flow, piece: bytes, *, is_whole: bool) -> None:
        if self.state == "half_open":
            flow.crossing.has_lost_bytes = True
            self.counters.swallowed_bytes += len(piece)
            return
        flow.lane.take(piece, time.monotonic(), more_follows=is_whole)
        self.counters.most_bytes_under_way = max(self.counters.most_bytes_under_way, flow.lane.num_bytes)
        self._arrange(flow)

    def _last(self, flow: Flow, how: End) -> None:
        flow.ended = True
        flow.source.ask(read=False)
        if self.state == "half_open":
            flow.crossing.has_lost_bytes = True
        else:
            flow.lane.end(how, time.monotonic())
            self._arrange(flow)

    # Out.

    def _arrange(self, flow: Flow) -> None:
        """Deliver what is due now, or be woken when it is."""
        due = flow.lane.next_due()
        if due is None or flow.blocked or flow.alarm_is_set or self.state == "pause":
            return
        if due <= time.monotonic() + EARLY_SECONDS:
            self._deliver(flow)
        else:
            flow.alarm_is_set = True
            self._loop.at(due, lambda: self._due(flow))

    def _due(self, flow: Flow) -> None:
        flow.alarm_is_set = False
        if flow.crossing.is_open:
            self._deliver(flow)

    def _writable(self, flow: Flow) -> None:
        flow.blocked = False
        flow.sink.ask(write=False)
        self._deliver(flow)

    def _deliver(self, flow: Flow) -> None:
        if self.state == "pause" or flow.blocked:
            return
        now = time.monotonic() + EARLY_SECONDS
        while flow.crossing.is_open and not flow.blocked and (due := flow.lane.next_due()) is not None and due <= now:
            piece = flow.lane.first()
            if isinstance(piece, End):
                flow.lane.arrived(0)
                self._finish(flow, piece)
            else:
                self._send(flow, piece)
        if not flow.crossing.is_open:
            return
        if flow.is_full and flow.lane.has_room():
            flow.is_full = False
            if flow.turnstile.limits:
                self._queue(flow)
            else:
                flow.source.ask(read=True)
        self._arrange(flow)

    def _send(self, flow: Flow, piece: memoryview) -> None:
        try:
            sent = flow.sink.sock.send(piece)
        except BlockingIOError:
            sent = 0
        except OSError:  # the sink has reset; the source is to know
            self.drop(flow.crossing, reset=True)
            return
        if sent:
            flow.lane.arrived(sent)
            self.counters.bytes_up += sent if flow.goes_up else 0
            self.counters.bytes_down += 0 if flow.goes_up else sent
            self._passed(self.counters.bytes_up + self.counters.bytes_down)
        if sent < len(piece):
            flow.blocked = True
            flow.sink.ask(write=True)

    def _finish(self, flow: Flow, how: End) -> None:
        flow.finished = True
        if how is End.RESET:
            self.drop(flow.crossing, reset=True)
        elif all(other.finished for other in flow.crossing.flows):
            self.drop(flow.crossing, reset=False)
        else:
            try:
                flow.sink.sock.shutdown(socket.SHUT_WR)
            except OSError:
                self.drop(flow.crossing, reset=True)
