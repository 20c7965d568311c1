"""Reading ahead: a thread that fetches the shards which the order comes to next."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Collection, Sequence

from trainfleet.data.shards.cache import Fetch, ShardCache
from trainfleet.errors import TrainfleetError

logger = logging.getLogger(__name__)

IDLE_SECONDS = 5.0


class ReadAhead:
    """Fetches what is expected, in order, as far as it fits beside all that is expected.

    Several processes may expect the same: each takes the first shard that nobody is at. What fails here fails again,
    and is said, where the shard is needed.
    """

    def __init__(self, cache: ShardCache) -> None:
        self.pid = os.getpid()
        # A view of its own on the folder: what is told to the reader's is of its waiting, not of ours.
        self._cache = ShardCache(cache.folder, cache.max_bytes, timeout=cache.timeout)
        self._wanted: Sequence[tuple[str, Fetch, int | None]] = ()
        self._keep: Collection[str] = ()
        self._changed = threading.Condition()
        self._closed, self._failed = False, frozenset[str]()
        self._thread: threading.Thread | None = None

    def expect(self, wanted: Sequence[tuple[str, Fetch, int | None]], keep: Collection[str]) -> None:
        with self._changed:
            if keep == self._keep:
                return
            self._wanted, self._keep = list(wanted), keep
            self._changed.notify()
            if self._thread is None and wanted:
                self._thread = threading.Thread(target=self._run, name="trainfleet-shards-ahead", daemon=True)
                self._thread.start()

    def close(self) -> None:
        with self._changed:
            self._closed, thread = True, self._thread
            self._changed.notify()
        if thread is not None:
            thread.join(0.5)  # one that fetches goes on to the end of its shard, and ends with the process

    def _run(self) -> None:
        while True:
            with self._changed:
                # Nobody need say that no more is read: a thread that has nothing to do ends, and is started anew.
                self._changed.wait_for(lambda: self._wanted or self._closed, IDLE_SECONDS)
                if self._closed or not self._wanted:
                    self._thread = None
                    return
                wanted, keep, self._wanted = self._wanted, self._keep, ()
            for name, fetch, num_bytes in wanted:
                if self._closed or self._wanted:
                    break  # what is wanted now begins with what is still missing
                if name not in self._failed:
                    self._fetch(name, fetch, num_bytes, keep)

    def _fetch(self, name: str, fetch: Fetch, num_bytes: int | None, keep: Collection[str]) -> None:
        try:
            self._cache.fetch_ahead(name, fetch, num_bytes=num_bytes, keep=keep)
        except TrainfleetError as exc:
            logger.debug("Reading ahead: %s", exc)
            self._failed |= {name}
        except Exception:
            logger.exception("Reading ahead of shard %s failed", name)
            self._failed |= {name}
