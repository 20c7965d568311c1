"""An epoch of data in shards through a cache of a quarter of them: the order in windows beside the order over all.

    python benchmarks/shards.py [--quick]

The dataset is MDS in shards of 1 MiB, samples of 16 KiB, on the disk of this host, read through a filesystem of fsspec
that counts. "fetched" is what was read of it, in times of the whole dataset; 1.00 is each shard once. Beside ours,
where they are installed, mosaicml-streaming and webdataset, each as its pages advise: StreamingDataset with the same
limit of its cache, shuffled in blocks of as many samples as a window of ours holds (its own default, a quarter million
samples and more, is all of this dataset); WebDataset, which keeps nothing, on the same samples as tar archives, with a
shuffle buffer of that many. All make batches of 64 in 2 worker processes and take turns; each figure is the median.
"spread" is how well an order mixes: the standard deviation of the mean number of the samples of a batch, over that of
batches drawn at random: 1.00 is as good as these. Numbers are in the order of the shards, so an order that never leaves
a shard has a spread of 8.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import statistics
import struct
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from measuring.table import RESULTS, Report, Table

from trainfleet.data import LocalBatches
from trainfleet.data.shards.mds import MosaicShards

SAMPLE = 16 << 10
SIZE = 64
PER_SHARD = 64
WORKERS = 2


class Counted(fsspec.AbstractFileSystem):
    """counted://PATH is the file /PATH; what is read of it is written down beside it."""

    protocol = "counted"
    cachable = False

    def _open(self, path: str, mode: str = "rb", **how: Any) -> Any:
        return CountedFile(Path("/", path))


class CountedFile:
    def __init__(self, path: Path) -> None:
        self._file, self._log = path.open("rb"), path.parent / "log"
        self.size = path.stat().st_size
        self.seek = self._file.seek

    def read(self, count: int) -> bytes:
        data = self._file.read(count)
        note(self._log, len(data))
        return data

    def close(self) -> None:
        self._file.close()


def note(log: Path, count: int) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, struct.pack("<q", count))
    os.close(descriptor)


def noted(log: Path) -> int:
    """Bytes since the last time."""
    total = int(np.frombuffer(log.read_bytes(), "<i8").sum()) if log.exists() else 0
    log.unlink(missing_ok=True)
    return total


def write_dataset(folder: Path, shards: int, per_shard: int) -> None:
    """MDS by its description: {"i": int, "x": array of SAMPLE bytes}; and the same samples as tar archives."""
    entries, chance = [], np.random.default_rng(0)
    names, encodings, sizes = ["i", "x"], ["int", f"ndarray:uint8:{SAMPLE}"], [8, SAMPLE]
    for number in range(shards):
        x = chance.integers(0, 256, (per_shard, SAMPLE), np.uint8)
        cells = [struct.pack("<q", number * per_shard + i) + x[i].tobytes() for i in range(per_shard)]
        config = json.dumps({"column_names": names}).encode()
        ends = np.cumsum([4 + 4 * (per_shard + 1) + len(config), *map(len, cells)]).astype("<u4")
        data = struct.pack("<I", per_shard) + ends.tobytes() + config + b"".join(cells)
        basename = f"shard.{number:05}.mds"
        (folder / basename).write_bytes(data)
        with tarfile.open(folder / f"{number:05}.tar", "w") as archive:
            for i in range(per_shard):
                for ending, content in (("cls", str(number * per_shard + i).encode()), ("bin", x[i].tobytes())):
                    info = tarfile.TarInfo(f"{number * per_shard + i:08}.{ending}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        entries.append(
            {
                "format": "mds",
                "version": 2,
                "samples": per_shard,
                "column_names": names,
                "column_encodings": encodings,
                "column_sizes": sizes,
                "compression": None,
                "hashes": [],
                "raw_data": {"basename": basename, "bytes": len(data), "hashes": {}},
                "zip_data": None,
                "size_limit": 1 << 26,
            }
        )
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": entries}))


def ours(folder: Path, cache: Path, cache_bytes: int, window: int, epoch: int, *, in_windows: bool) -> Iterator[Any]:
    source = MosaicShards(f"counted:/{folder}", cache=cache, cache_bytes=cache_bytes, window=window)
    if not in_windows:
        source.blocks = None  # type: ignore[assignment]  # then the order is that of any source
    with LocalBatches(source, size=SIZE, epochs=1, seed=epoch, workers=WORKERS) as stream:
        for batch in stream:
            yield batch["i"].numpy()


def streaming(folder: Path, cache: Path, cache_bytes: int, window: int, epoch: int) -> Iterator[Any]:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    clean_stale_shared_memory()
    dataset = StreamingDataset(
        remote=str(folder),
        local=str(cache),
        shuffle=True,
        shuffle_seed=epoch,
        batch_size=SIZE,
        cache_limit=cache_bytes,
        predownload=4 * SIZE,
        num_canonical_nodes=1,
        shuffle_block_size=window * PER_SHARD,
    )
    for batch in DataLoader(dataset, batch_size=SIZE, num_workers=WORKERS):
        yield np.asarray(batch["i"])


def webdataset(folder: Path, cache: Path, cache_bytes: int, window: int, epoch: int) -> Iterator[Any]:
    import webdataset as wds
    from torch.utils.data import DataLoader

    urls = sorted(map(str, folder.glob("*.tar")))
    pipeline = (
        wds.WebDataset(urls, shardshuffle=len(urls), seed=epoch, empty_check=False)
        .shuffle(window * PER_SHARD // WORKERS)
        .decode()
        .to_tuple("cls", "bin")
        .map_tuple(None, lambda data: np.frombuffer(data, np.uint8).copy())
        .batched(SIZE)
    )
    for numbers, _ in DataLoader(pipeline, batch_size=None, num_workers=WORKERS):
        yield np.asarray(numbers)


def measured(batches: Iterator[Any], samples: int) -> tuple[float, float, bool]:
    """(samples a second, spread, whether each sample came once)."""
    began = time.perf_counter()
    found = [np.asarray(batch) for batch in batches]
    rate = sum(map(len, found)) / (time.perf_counter() - began)
    numbers = np.concatenate(found)
    means = [batch.mean() for batch in found if len(batch) == SIZE]
    alone = np.sqrt((samples**2 - 1) / 12 / SIZE)  # of a mean of SIZE numbers of 0 .. samples - 1
    return rate, float(np.std(means) / alone), len(set(numbers.tolist())) == len(numbers) == samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small dataset, only to see that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    parser.add_argument("--shards", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.quick:
        options.shards, options.rounds = 16, 1
    torch.set_num_threads(1)
    fsspec.register_implementation("counted", Counted)
    report = Report(name="shards", summary=__doc__.split("\n\n")[2].replace("\n", " "))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "data")
        folder.mkdir()
        report.add(table_of(folder, options))
    report.write(options.results)


def table_of(folder: Path, options: argparse.Namespace) -> Table:
    write_dataset(folder, options.shards, PER_SHARD)
    samples, whole = options.shards * PER_SHARD, sum(f.stat().st_size for f in folder.glob("*.mds"))
    cache_bytes, window = whole // 4, max(1, options.shards // 16)
    ways: dict[str, Callable[..., Iterator[Any]]] = {
        f"trainfleet, windows of {window} shards": lambda *how: ours(*how, in_windows=True),
        "trainfleet, one order over all": lambda *how: ours(*how, in_windows=False),
    }
    ways |= {name: way for name, way in (("streaming", streaming), ("webdataset", webdataset)) if find_spec(name)}
    figures: dict[str, list[tuple[float, float, float, bool]]] = {name: [] for name in ways}
    for epoch in range(options.rounds):
        for name, way in ways.items():
            cache = folder.parent / "cache"
            shutil.rmtree(cache, ignore_errors=True)
            noted(folder / "log")
            rate, spread, once = measured(way(folder, cache, cache_bytes, window, epoch), samples)
            figures[name].append((rate, noted(folder / "log") / whole, spread, once))
    rows: list[list[str | float | None]] = []
    for name, rounds in figures.items():
        rate, times, spread = (statistics.median(one[column] for one in rounds) for column in range(3))
        counted = f"{times:.2f}" if name.startswith("trainfleet") else None
        rows.append([name, f"{rate:,.0f}", counted, f"{spread:.2f}", "yes" if all(one[3] for one in rounds) else "no"])
    return Table(
        title=f"{options.shards} shards of 1 MiB, a cache of a quarter, {options.rounds} epochs from an empty cache",
        columns=["order", "samples/s", "fetched, times the data", "spread", "each sample once"],
        rows=rows,
        notes=["A dash: what others fetch is not counted."],
    )


if __name__ == "__main__":
    main()
