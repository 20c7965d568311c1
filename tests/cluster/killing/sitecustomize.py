"""Kills, in processes of the run under test: at a chosen call of a chosen function, once.

Python imports this module at its start where its folder is on PYTHONPATH. The package itself knows nothing of it: the
functions are wrapped when their modules are imported, so a function that is renamed breaks the test.

KILLS is a JSON file with a list of {"place", "call", "rank", "victims"}; beside it lies one file for each that is done.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

# place: module, its function or method, and whether the kill comes before or after it
PLACES = {
    "mid-step": ("trainfleet.parallel.engine", "NativeEngine.clip", "before"),
    "staging": ("trainfleet.checkpoint.staging", "copy_bytes", "before"),
    "writing shards": ("trainfleet.checkpoint.sealed", "RunningDigest.update", "before"),
    "before the commit": ("trainfleet.checkpoint.manifest", "write_manifest", "before"),
    "at the rename": ("trainfleet.store.file", "_fsync_folder", "before"),
    "after the commit": ("trainfleet.checkpoint.manifest", "write_manifest", "after"),
    "pruning": ("trainfleet.store.file", "FileStore.delete", "after"),
    "restoring": ("trainfleet.checkpoint.loading", "Loading.apply", "before"),
}


def current():
    """The first kill that is not done yet, and its mark."""
    plan = Path(os.environ["KILLS"])
    for number, kill in enumerate(json.loads(plan.read_text())):
        mark = plan.with_name(f"{plan.stem}.{number}.done")
        if not mark.exists():
            return kill, mark
    return None, None


def is_writer():
    return sys.argv[:1] == ["-c"]


def strike(kill, mark):
    """Once, whichever process comes first."""
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    rank = os.getppid() if is_writer() else os.getpid()
    agent = int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1])
    below = children(agent)  # the ranks, and the process that they are copied from
    victims = {
        "rank": [rank],
        "ranks": [pid for pid in below if Path(f"/proc/{pid}/comm").read_text().startswith("rank ")],
        "writer": [os.getpid()],
        "all": below,
        "job": [agent, *below],
    }
    for pid in victims[kill["victims"]]:
        if pid != os.getpid():
            os.kill(pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def children(parent):
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(words[1]) == parent:
                found.append(int(entry.name))
    return found


def wrapped(function, place, when):
    calls = 0

    def call(*args, **kwargs):
        nonlocal calls
        kill, mark = current()
        mine = kill is not None and kill["place"] == place and str(kill["rank"]) == os.environ.get("RANK")
        if mine:
            calls += 1
        due = mine and calls >= kill["call"]
        if due and when == "before":
            strike(kill, mark)
        result = function(*args, **kwargs)
        if due and when == "after":
            strike(kill, mark)
        return result

    return call


class Hook:
    def find_spec(self, name, path=None, target=None):
        found = [(where, place, when) for place, (module, where, when) in PLACES.items() if module == name]
        if not found:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            for where, place, when in found:
                owner = module
                *parents, last = where.split(".")
                for parent in parents:
                    owner = getattr(owner, parent)
                setattr(owner, last, wrapped(getattr(owner, last), place, when))

        spec.loader.exec_module = exec_module
        return spec


if "KILLS" in os.environ:  # also where ranks are only to be copied from
    sys.meta_path.insert(0, Hook())
