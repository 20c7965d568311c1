"""The roll call at a meeting: who came, each once, told the same, running the same, with clocks that agree.

Every rank leaves an entry in the store that all share; rank 0 looks at them and tells everyone the same verdict.
"""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from trainfleet.comm.environment import RankEnvironment
from trainfleet.errors import PeerError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

logger = logging.getLogger(__name__)

CLOCKS_APART_SECONDS = 5.0
"""More than that is said aloud: reports name the rank that failed first, by the clocks of the hosts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RollCall:
    """One rank's part in one meeting."""

    store: Store
    environment: RankEnvironment
    facts: Mapping[str, str]
    """What has to be alike, such as versions."""
    timeout: timedelta
    noun: str
    """What a rank is called in sentences: `rank`, or `host` where launchers meet."""

    def answer(self) -> None:
        """Return once all have come and are alike; otherwise all raise the same PeerError."""
        rank, store = self.environment.rank, self.store
        if self._returns():
            return
        trouble = self._enter()
        if trouble:
            store.set("trouble", trouble)
        if rank == 0:
            self._judge()
        try:
            # Rank 0's own wait has to end first, so that its verdict still finds us here.
            patience = self.timeout + timedelta(seconds=10)
            if rank:
                store.wait(["go"], patience)
                store.set(f"clock/{rank}", repr(time.time()))
            store.wait(["verdict"], patience)
            complaint = json.loads(store.get("verdict"))
            store.add("heard", int(rank != 0))
        except (_dist_error(), RuntimeError) as exc:
            raise PeerError(
                f"{self._name(rank)} met no {self.noun} 0 at {self.environment.master_addr}:"
                f"{self.environment.master_port} within {self.timeout.total_seconds():g} s, though something listens "
                "there."
            ) from exc
        if complaint or trouble:  # ours alone, where the others had met before we came
            raise PeerError(complaint or trouble)

    def _name(self, rank: int) -> str:
        return f"{self.noun.capitalize()} {rank}"

    def _returns(self) -> bool:
        """Whether this is a host that comes back to a run which goes on without it: its meeting was long ago."""
        if self.noun != "host" or not self.store.check(["verdict"]):
            return False
        first = json.loads(self.store.get("entry/0"))
        if complaint := self._unlike(first, self._own_entry()):
            raise PeerError(complaint)
        return True

    def _own_entry(self) -> dict[str, Any]:
        return {"rank": self.environment.rank, "host": socket.gethostname(), "facts": dict(self.facts)}

    def _enter(self) -> str:
        """Leave this rank's entry; or return why there cannot be one."""
        rank, size, store = self.environment.rank, self.environment.world_size, self.store
        told = int(store.compare_set("world_size", "", str(size)))
        if told != size:
            return (
                f"{self._name(rank)} ({socket.gethostname()}) was told of {size} {self.noun}s, another of {told}. "
                "Tell all of them the same number."
            )
        if not self.environment.agent_store and store.add(f"claims/{rank}", 1) > 1:
            store.wait([f"entry/{rank}"], self.timeout)
            other = json.loads(store.get(f"entry/{rank}"))["host"]
            return (
                f"{self._name(rank)} of {size} came twice: from {other} and from {socket.gethostname()}. "
                f"Give each {self.noun} a number of its own, from 0 to {size - 1}."
            )
        store.set(f"entry/{rank}", json.dumps(self._own_entry()))
        store.add("came", 1)
        return ""

    def _judge(self) -> None:
        """Rank 0: await everyone, compare, and set the verdict."""
        store = self.store
        before = time.time()
        complaint = self._await_all()
        if not complaint:
            entries = [json.loads(store.get(f"entry/{rank}")) for rank in range(self.environment.world_size)]
            complaint = next((words for entry in entries[1:] if (words := self._unlike(entries[0], entry))), "")
            before = time.time()
        store.set("go", "")
        if not complaint:
            self._compare_clocks(entries, before)
        store.set("verdict", json.dumps(complaint))
        if complaint and not self.environment.agent_store:
            # We are the store: were we to go at once, the others would see a broken connection and no verdict.
            self._linger()

    def _await_all(self) -> str:
        """What stands in the way of all having come, in a sentence; empty when they have."""
        size, store = self.environment.world_size, self.store
        ends, pause = time.monotonic() + self.timeout.total_seconds(), 0.001
        while int(store.add("came", 0)) < size:
            if store.check(["trouble"]):
                return str(store.get("trouble").decode())
            if time.monotonic() > ends:
                missing = [rank for rank in range(size) if not store.check([f"entry/{rank}"])]
                return (
                    f"Of {size} {self.noun}s, {self.noun}{'s' * (len(missing) > 1)} {', '.join(map(str, missing))} did "
                    f"not come within {self.timeout.total_seconds():g} s. Start all of them, each told the same number "
                    f"of {self.noun}s."
                )
            time.sleep(pause)
            pause = min(0.05, pause * 1.5)
        return ""

    def _unlike(self, first: dict[str, Any], other: dict[str, Any]) -> str:
        for name, value in first["facts"].items():
            if other["facts"].get(name) != value:
                return (
                    f"{self._name(other['rank'])} ({other['host']}) has {name} {other['facts'].get(name)}, but "
                    f"{self.noun} 0 ({first['host']}) has {name} {value}. Use the same everywhere."
                )
        return ""

    def _compare_clocks(self, entries: list[dict[str, Any]], before: float) -> None:
        """Warn of hosts whose clock shows another time than ours, by more than the message can have taken."""
        keys = [f"clock/{entry['rank']}" for entry in entries[1:]]
        try:
            self.store.wait(keys, self.timeout)
        except (_dist_error(), RuntimeError):
            return  # a rank has gone meanwhile, which the first exchange of the run will say
        after = time.time()
        for entry in entries[1:]:
            shown = float(self.store.get(f"clock/{entry['rank']}"))
            apart = max(before - shown, shown - after)
            if entry["host"] != entries[0]["host"] and apart > CLOCKS_APART_SECONDS:
                logger.warning(
                    "The clock of %s (%s %d) is %.0f s %s that of %s (%s 0). The report of a failure names what came "
                    "first by these clocks: let both follow a time server (chrony, ntpd).",
                    *(entry["host"], self.noun, entry["rank"], apart, "behind" if shown < before else "ahead of"),
                    *(entries[0]["host"], self.noun),
                )

    def _linger(self) -> None:
        """Up to two seconds for the others to hear the verdict."""
        others = int(self.store.add("came", 0)) - 1
        ends = time.monotonic() + 2
        while self.store.add("heard", 0) < others and time.monotonic() < ends:
            time.sleep(0.02)


def _dist_error() -> type[Exception]:
    from torch.distributed import DistError  # type: ignore[attr-defined]

    return DistError  # type: ignore[no-any-return]
