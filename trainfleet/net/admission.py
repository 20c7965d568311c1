"""Who may come in: TLS and the first words of each connection in a thread of its own, with a deadline and a cap."""

from __future__ import annotations

import logging
import queue
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from datetime import timedelta

from trainfleet.errors import NotAdmitted, PeerError
from trainfleet.net.address import Address
from trainfleet.net.credentials import Credentials
from trainfleet.net.dial import remember
from trainfleet.net.hello import MAGIC, Manners, receive, send_message
from trainfleet.net.sockets import close_gently, set_remaining, tune
from trainfleet.net.tls import refusal, start_tls

logger = logging.getLogger(__name__)

MOST_PENDING = 64
"""First words that go on at once; one more ends the oldest, since honest ones take milliseconds."""
_SLOW_SECONDS = 1.0
"""Before a wrong secret is answered."""
_MOST_READY = 256
"""Admitted connections that nobody has taken."""
_MOST_NAMED = 1024
"""Hosts of which the log has said that they were refused."""
_TLS_HANDSHAKE = 0x16  # the first byte of TLS


class Admission:
    """Takes strangers, and gives those who have proved who they are."""

    def __init__(
        self,
        credentials: Credentials,
        *,
        role: str,
        admits: Collection[str] | None,
        handshake: timedelta,
        most_pending: int,
    ) -> None:
        self._credentials = credentials
        self._role, self._admits = role, admits
        self._handshake, self._most_pending = handshake.total_seconds(), most_pending
        self._context = credentials.server_context()
        self._fingerprint = credentials.shown
        self.refused: Counter[str] = Counter()
        """Connections that were not admitted, by reason."""
        self._named: set[str] = set()
        self._lock = threading.Lock()
        self._pending: dict[int, socket.socket] = {}  # by number of arrival; duplicates, only to break them off
        self._arrivals = 0
        self._threads: set[threading.Thread] = set()
        self._ready: queue.Queue[socket.socket | None] = queue.Queue(_MOST_READY)
        self.closing = threading.Event()

    def take(self, timeout: timedelta) -> socket.socket | None:
        """The next that was admitted; queue.Empty at the end of `timeout`, None once closed."""
        if self.closing.is_set():
            return None
        sock = self._ready.get(timeout=max(0.0, timeout.total_seconds()))
        if sock is None:
            with suppress(queue.Full):
                self._ready.put_nowait(None)  # for others who wait
        return sock

    def close(self) -> None:
        """Let go of all who have not been taken; nobody may arrive any more. May be called twice."""
        self.closing.set()
        with self._lock:
            for pending in self._pending.values():
                _break_off(pending)
            threads = list(self._threads)
        for thread in threads:
            thread.join(self._handshake)
        self._drop_ready()

    def arrived(self, sock: socket.socket, peer: Address) -> None:
        """Hand a new connection to a thread; the oldest that has not finished ends if there are too many."""
        with self._lock:
            if len(self._pending) >= self._most_pending:
                _break_off(self._pending.pop(min(self._pending)))
                self.refused["too many"] += 1
            number = self._arrivals = self._arrivals + 1
            thread = threading.Thread(target=self._meet, args=(number, sock, peer), daemon=True, name=f"greet {peer}")
            try:
                self._pending[number] = sock.dup()
                self._threads.add(thread)
                thread.start()
                return
            except (OSError, RuntimeError) as exc:  # no descriptor or no thread left
                self._threads.discard(thread)
                if (double := self._pending.pop(number, None)) is not None:
                    double.close()
                sock.close()
                error = exc
        self.exhausted(error)

    def exhausted(self, exc: Exception) -> None:
        """Count a connection for which this host had nothing left."""
        self.refuse("exhausted", "this host", f"Nobody can connect: {exc}. Raise `ulimit -n` or `ulimit -u`.")

    def _meet(self, number: int, sock: socket.socket, peer: Address) -> None:
        try:
            admitted = self._admit(sock, peer)
        finally:
            with self._lock:
                double = self._pending.pop(number, None)
                self._threads.discard(threading.current_thread())
                if double is not None:
                    double.close()
        if admitted is None:
            return
        if self.closing.is_set() or double is None:
            admitted.close()
            return
        try:
            self._ready.put_nowait(admitted)
        except queue.Full:
            self.refused["not taken"] += 1
            admitted.close()
        else:
            if self.closing.is_set():  # close() may have emptied the queue a moment before
                self._drop_ready()

    def _drop_ready(self) -> None:
        with suppress(queue.Empty):
            while True:
                if (sock := self._ready.get_nowait()) is not None:
                    sock.close()
        with suppress(queue.Full):
            self._ready.put_nowait(None)  # for those who wait

    def _admit(self, sock: socket.socket, peer: Address) -> socket.socket | None:
        """The connection after TLS and the first words; None, closed and counted, where they failed."""
        ends = time.monotonic() + self._handshake
        try:
            tune(sock)
            self._same_kind(sock, peer, ends)
            if self._context is not None:
                sock = start_tls(self._context, sock, name=None, ends=ends)
            ours = Manners(
                role=self._role,
                admits=self._admits,
                secret=self._credentials.secret,
                fingerprint=self._fingerprint,
                certified=self._credentials.certificates is not None,
                address=str(peer),
            )
            found = receive(sock, ours, ends, slow=lambda: self.closing.wait(_SLOW_SECONDS))
            sock.settimeout(None)
            return remember(sock, found)
        except TimeoutError:
            self.refuse("silence", peer.host, None)
        except NotAdmitted as exc:
            self.refuse("not admitted", peer.host, str(exc))
        except PeerError:
            self.refuse("not trainfleet", peer.host, None)
        except ssl.SSLError as exc:
            refused = refusal(exc, str(peer))
            self.refuse("not admitted" if refused else "broke off", peer.host, str(refused) if refused else None)
        except OSError:
            self.refuse("broke off", peer.host, None)
        except ValueError:  # ssl, of a socket that was broken off under it
            self.refuse("broke off", peer.host, None)
        close_gently(sock)
        return None

    def _same_kind(self, sock: socket.socket, peer: Address, ends: float) -> None:
        """NotAdmitted, and a word to the other side, if one side speaks TLS and the other does not."""
        set_remaining(sock, ends)
        first = sock.recv(1, socket.MSG_PEEK)
        if self._context is not None and first == MAGIC[:1]:
            send_message(sock, {"refused": "tls"}, ends)
            raise NotAdmitted(f"{peer} speaks without TLS, and we want it.")
        if self._context is None and first and first[0] == _TLS_HANDSHAKE:
            send_message(sock, {"refused": "tls"}, ends)  # which its TLS takes for what it is: no TLS
            raise NotAdmitted(f"{peer} speaks TLS, and we listen without.")

    def refuse(self, reason: str, host: str, sentence: str | None) -> None:
        """Count, and for what a person should know, one line for each host."""
        with self._lock:
            self.refused[reason] += 1
            new = host not in self._named and len(self._named) < _MOST_NAMED
            if sentence is not None and new:
                self._named.add(host)
        if sentence is not None and new:
            logger.warning("%s Further ones from %s are only counted.", sentence, host)
        else:
            logger.debug("A connection from %s was not admitted: %s.", host, reason)


def _break_off(double: socket.socket) -> None:
    """End a connection that another thread is at: its next call fails, and that thread closes it."""
    with suppress(OSError):
        double.shutdown(socket.SHUT_RDWR)
    double.close()
