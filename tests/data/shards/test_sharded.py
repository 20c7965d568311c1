"""Any source in shards: windows that fit, what it says of itself, and the same samples however they are read."""

from __future__ import annotations

import http.server
import pickle
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from data.shards.made import fetched, mood, same, sample, used, watched, write_mds

from trainfleet.data import LocalBatches
from trainfleet.data.feed import DataService, RemoteBatches
from trainfleet.data.feed.stock import digest_of
from trainfleet.data.order import epoch_order
from trainfleet.data.shards.mds import MosaicShards
from trainfleet.data.shards.sharded import cached_name, chosen
from trainfleet.errors import DataError


def source(tmp_path, *, scheme="shaky:/", cache="cache", cache_bytes=20_000, window=3, **how):
    if not (tmp_path / "d").exists():
        write_mds(tmp_path / "d", samples=320, hashes=())
    return MosaicShards(f"{scheme}{tmp_path}/d", cache=tmp_path / cache, cache_bytes=cache_bytes, window=window, **how)


def batches(stream, count=None):
    found = []
    for batch in stream:
        found.append(batch)
        if len(found) == count:
            break
    stream.close()
    return found


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_are_the_same_with_any_number_of_workers_and_wherever_the_shards_are(tmp_path, workers):
    plain = LocalBatches([sample(i) for i in range(320)], size=16, seed=4, epochs=1, shuffle=False, collate="numpy")
    rows = [row for batch in batches(plain) for row in batch["x"]]
    ours = LocalBatches(source(tmp_path), size=16, seed=4, epochs=2, workers=workers, collate="numpy")
    local = LocalBatches(source(tmp_path, scheme=""), size=16, seed=4, epochs=2, collate="numpy")
    found, wanted = batches(ours), batches(local)
    assert len(found) == 40 and all(same(*pair) for pair in zip(found, wanted))
    blocks = source(tmp_path).blocks
    order = [i for epoch in (0, 1) for i in epoch_order(num_samples=320, seed=4, epoch=epoch, blocks=blocks)]
    assert [int(i) for batch in found for i in batch["i"]] == order
    assert all((row == rows[i]).all() for batch in found for i, row in zip(batch["i"], batch["x"]))
    assert used(tmp_path / "cache") <= 20_000


def test_an_epoch_in_windows_fetches_each_shard_about_once(tmp_path):
    ours = source(tmp_path, cache_bytes=22_000, window=10)  # of 44 kB
    with watched(tmp_path / "cache") as most:
        batches(LocalBatches(ours, size=4, epochs=1, workers=3, prefetch=1, collate="numpy"))
    assert 11_000 < most[0] <= 22_000
    whole = sum(f.stat().st_size for f in (tmp_path / "d").glob("*.mds"))
    counts = sum(count for name, count in fetched(tmp_path / "d").items() if name.endswith(".mds"))
    assert whole <= counts <= 1.3 * whole, "the next epoch's first window may be there already"


def test_a_stream_goes_on_in_the_middle_of_an_epoch(tmp_path):
    whole = batches(LocalBatches(source(tmp_path), size=16, seed=1, collate="numpy"), 25)
    stream = LocalBatches(source(tmp_path), size=16, seed=1, workers=1, collate="numpy")
    batches_before = [next(stream) for _ in range(7)]
    state = stream.state_dict()
    stream.close()
    other = LocalBatches(source(tmp_path, cache="other"), size=16, seed=1, collate="numpy")
    other.load_state_dict(state)
    assert all(same(*pair) for pair in zip(batches_before + batches(other, 18), whole))


def test_slow_shards_are_waited_for_and_a_worker_that_waits_is_not_taken_for_hung(tmp_path):
    from datetime import timedelta

    shards = source(tmp_path)
    mood(tmp_path / "d", seconds=0.05, piece=100)  # 0.6 s a shard
    stream = LocalBatches(shards, size=4, workers=1, timeout=timedelta(seconds=0.3), restarts=0, collate="numpy")
    assert len(batches(stream, 1)[0]["i"]) == 4


def test_a_window_that_does_not_fit_is_refused_with_what_would(tmp_path):
    with pytest.raises(DataError, match=r"windows of 9 shards, of \d+ bytes .* may hold 5000") as no:
        source(tmp_path, cache_bytes=5000, window=9)
    assert "window=4" in no.value.hint
    assert source(tmp_path, cache_bytes=5000, window=4).blocks.window == 4
    assert source(tmp_path, window=None, cache_bytes=10**6).blocks.window == 40, "all of little data"


def test_indices_outside_are_no_samples(tmp_path):
    with pytest.raises(IndexError, match="Sample 320 is not among the 320 of MDS"):
        source(tmp_path)[320]
    with pytest.raises(IndexError):
        source(tmp_path)[-1]


def test_it_can_be_sent_to_another_process(tmp_path):
    first = source(tmp_path)
    first.expect([0], [1])
    again = pickle.loads(pickle.dumps(first))
    assert same(again[5], sample(5)) and again.blocks == first.blocks
    first.close()


def test_shards_without_samples_are_no_blocks(tmp_path):
    assert min(source(tmp_path).blocks.sizes) > 0


def test_names_in_the_cache_lead_nowhere():
    name = cached_name("s3://b/../../etc/passwd?key=secret", "x")
    assert "/" not in name and "secret" not in name
    assert cached_name("s3://a/x.mds") != cached_name("s3://b/x.mds") and not cached_name("a/b.part").endswith(".part")


def test_columns_are_chosen_by_name_or_under_another():
    assert chosen(None, ["a", "b"], "D") == {"a": "a", "b": "b"}
    assert chosen({"input": "a"}, ["a", "b"], "D") == {"input": "a"}
    with pytest.raises(DataError, match="D has no column c"):
        chosen(["c"], ["a", "b"], "D")
    assert np.array_equal(list(chosen(["b"], ["a", "b"], "D")), ["b"])


def test_two_feeders_with_caches_of_their_own_feed_the_batches_of_local_data(tmp_path):
    plain = LocalBatches(source(tmp_path, scheme=""), size=8, seed=3, collate="numpy")
    wanted = [next(plain) for _ in range(60)]
    caches = [tmp_path / "one", tmp_path / "two"]
    services = [
        DataService(
            LocalBatches(source(tmp_path, cache=cache), size=8, seed=3, workers=2, collate="numpy"),
            address="127.0.0.1:0",
        ).open()
        for cache in caches
    ]
    try:
        with RemoteBatches([str(service.address) for service in services], as_numpy=True) as fed:
            first = [next(fed) for _ in range(25)]
            state = fed.state_dict()
        with RemoteBatches([str(services[1].address)], as_numpy=True) as fed:
            fed.load_state_dict(state)
            rest = [next(fed) for _ in range(35)]
    finally:
        for service in services:
            service.close()
    assert all(same(*pair) for pair in zip(first + rest, wanted))
    assert all(0 < used(cache) <= 20_000 for cache in caches)


def test_a_feeder_with_another_window_is_not_taken_for_one_of_the_same_data(tmp_path):
    digests = {digest_of(LocalBatches(source(tmp_path, window=w), size=8).maker) for w in (2, 3)}
    others = {digest_of(LocalBatches(source(tmp_path, cache=c, cache_bytes=30_000), size=8).maker) for c in "ab"}
    assert len(digests) == 2 and len(others | digests) == 2, "caches may differ, windows not"


class Breaking(http.server.SimpleHTTPRequestHandler):
    """Serves byte ranges, and breaks off in the middle of every third answer of a shard."""

    folder = ""
    answers = 0

    def do_GET(self):
        data = Path(self.folder, self.path.lstrip("/")).read_bytes()
        begin, end = 0, len(data)
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or ""):
            begin, end = int(asked[1]), min(int(asked[2]) + 1, end)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(end - begin))
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        self.end_headers()
        Breaking.answers += self.path.endswith(".mds")
        if Breaking.answers % 3 == 2:
            end -= (end - begin) // 2
            self.close_connection = True
        self.wfile.write(data[begin:end])
        if self.close_connection:
            self.connection.close()

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Content-Length", str(Path(self.folder, self.path.lstrip("/")).stat().st_size))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def log_message(self, *words):
        pass


def test_shards_come_whole_from_a_web_server_that_breaks_off_to_the_parent_and_to_workers(tmp_path):
    pytest.importorskip("aiohttp", reason="fsspec reads http through aiohttp, which is not installed")
    write_mds(tmp_path / "d", samples=80)
    Breaking.folder = str(tmp_path / "d")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Breaking) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ours = MosaicShards(f"http://127.0.0.1:{server.server_port}", cache=tmp_path / "cache", window=3)
        assert same(ours[0], sample(0)), "and from here on there are threads that a fork does not take along"
        with LocalBatches(ours, size=8, epochs=1, workers=2, collate="numpy") as stream:
            found = list(stream)
        server.shutdown()
    assert sorted(int(i) for batch in found for i in batch["i"]) == list(range(80))
    assert Breaking.answers > 10, "some were asked for again"
