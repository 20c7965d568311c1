from __future__ import annotations

import json
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainfleet.errors import StoreError
from trainfleet.events import RunEnded
from trainfleet.monitor.history import figures, read_brief, read_run
from trainfleet.monitor.history.brief import _kept
from trainfleet.monitor.jsonl import JsonLines
from trainfleet.monitor.run_folder import RunFolder


@pytest.fixture
def long_run(tmp_path: Path, story: Any, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setattr("trainfleet.monitor.history.brief.KEPT_FROM_BYTES", 1)
    files = RunFolder(tmp_path / "run")
    files.create()
    log = JsonLines(files.metrics)
    for event in story.run():
        log.on_event(event)
    log.close()
    return files


def not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_again(path: Path) -> None:
        raise AssertionError(f"{path} is read again")

    monkeypatch.setattr("trainfleet.monitor.history.brief.read_run", read_again)


def test_it_has_the_figures_and_when_the_run_began(long_run: RunFolder) -> None:
    run = read_run(long_run.path)
    told = read_brief(long_run.path)
    assert told == {"folder": str(long_run.path), "started": run.starts[0].time, "went_on": run.starts[-1].time,
                    **figures(run)}  # fmt: skip


def test_a_run_that_ended_is_read_once(long_run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read_brief(long_run.path)
    not_read_again(monkeypatch)
    assert read_brief(long_run.path) == first


def test_a_run_that_goes_on_is_read_anew(long_run: RunFolder) -> None:
    assert read_brief(long_run.path)["end"] == "finished"
    with closing(long_run.hold()):
        assert read_brief(long_run.path)["end"] == "running"
    log = JsonLines(long_run.metrics)
    log.on_event(RunEnded(step=40, reason="a second word", seconds=1.0))
    log.close()
    assert read_brief(long_run.path)["end"] == "a second word"


def test_a_run_under_way_and_a_short_one_are_not_kept(long_run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(long_run.hold()):
        read_brief(long_run.path)
    monkeypatch.setattr("trainfleet.monitor.history.brief.KEPT_FROM_BYTES", 1 << 20)
    read_brief(long_run.path)
    assert not long_run.brief.exists()


def test_where_it_cannot_be_kept_it_is_told(long_run: RunFolder) -> None:
    long_run.brief.mkdir()
    assert read_brief(long_run.path)["end"] == "finished"


def test_what_another_version_kept_is_not_taken(long_run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    read_brief(long_run.path)
    monkeypatch.setattr("trainfleet.monitor.history.brief.installed", lambda name: "0.0")
    not_read_again(monkeypatch)
    with pytest.raises(AssertionError, match="is read again"):
        read_brief(long_run.path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["brief", "sha256", "end"]), inner),
    max_leaves=6,
)


@given(JSON | st.binary(max_size=20))
def test_what_is_none_of_ours_is_not_taken(tmp_path_factory: pytest.TempPathFactory, found: Any) -> None:
    file = tmp_path_factory.getbasetemp() / f"brief-{os.getpid()}.json"
    file.write_bytes(found if isinstance(found, bytes) else json.dumps(found).encode())
    assert _kept(file, {"bytes": 1}) is None


def test_a_flipped_bit_anywhere_is_seen(long_run: RunFolder) -> None:
    told = read_brief(long_run.path)
    whole = long_run.brief.read_bytes()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 7
        long_run.brief.write_bytes(damaged)
        assert read_brief(long_run.path) == told


def test_what_is_no_run_is_refused_as_ever(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is no run"):
        read_brief(tmp_path)
