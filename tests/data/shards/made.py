"""Small datasets in shards, written by what the formats say; a filesystem that breaks off, lies, is slow and counts."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import io
import json
import os
import struct
import tarfile
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import xxhash
import zstandard

from trainfleet.data.shards.cache import ShardCache

COLUMNS = {"i": "int", "x": "ndarray:uint16:50", "note": "str"}
PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "zstd": zstandard.ZstdCompressor().compress}


def sample(i, width=50):
    return {"i": i, "x": np.full(width, i, np.uint16), "note": f"sample {i}"}


def write_mds(folder: Path, *, samples=60, per_shard=8, compression=None, hashes=("xxh64",), width=50) -> Path:
    """`sample(i)` of each i as an MDS dataset, by the description of the format alone."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = {**COLUMNS, "x": f"ndarray:uint16:{width}"}
    names, sizes = sorted(columns), {"i": 8, "x": 2 * width, "note": None}
    shards = []
    for number, begin in enumerate(range(0, samples, per_shard)):
        cells = [_mds_sample(sample(i, width)) for i in range(begin, min(begin + per_shard, samples))]
        config = json.dumps({"columns": columns}).encode()
        ends = np.cumsum([4 + 4 * (len(cells) + 1) + len(config), *map(len, cells)]).astype("<u4")
        raw = struct.pack("<I", len(cells)) + ends.tobytes() + config + b"".join(cells)
        raw_data = _described(f"shard.{number:05}.mds", raw, hashes)
        zip_data = None
        stored, name = raw, raw_data["basename"]
        if compression:
            stored, name = PACKERS[compression](raw), f"{name}.{compression}"
            zip_data = _described(name, stored, hashes)
        (folder / name).write_bytes(stored)
        shards.append(
            {
                "column_encodings": [columns[name] for name in names],
                "column_names": names,
                "column_sizes": [sizes[name] for name in names],
                "compression": compression,
                "format": "mds",
                "hashes": list(hashes),
                "raw_data": raw_data,
                "samples": len(cells),
                "size_limit": 1 << 26,
                "version": 2,
                "zip_data": zip_data,
            }
        )
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    return folder


def _mds_sample(one):
    note = one["note"].encode()
    return struct.pack("<I", len(note)) + struct.pack("<q", one["i"]) + note + one["x"].astype("<u2").tobytes()


def _described(name, data, hashes):
    known = {"xxh64": lambda d: xxhash.xxh64(d).hexdigest(), "sha1": lambda d: hashlib.sha1(d).hexdigest()}
    return {"basename": name, "bytes": len(data), "hashes": {h: known[h](data) for h in hashes}}


def tarred(files, *, form=tarfile.PAX_FORMAT, change=None) -> bytes:
    """An archive of {name: bytes}, written by the standard library."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5  # a fraction, which pax writes in a header of its own
            if change is not None:
                change(info)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def tar_files(i, width=50):
    """`sample(i)` as files."""
    array = io.BytesIO()
    np.save(array, np.full(width, i, np.uint16))
    name = f"some/{i:05}"
    return {
        f"{name}.i.cls": str(i).encode(),
        f"{name}.x.npy": array.getvalue(),
        f"{name}.note.txt": f"sample {i}".encode(),
    }


NAMES = {"i": "i.cls", "x": "x.npy", "note": "note.txt"}


def write_tars(folder: Path, *, samples=60, per_shard=8, ending=".tar") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pack = {".tar": bytes, ".tar.gz": gzip.compress, ".tgz": gzip.compress, ".tar.bz2": bz2.compress}
    pack[".tar.zst"] = PACKERS["zstd"]
    for number, begin in enumerate(range(0, samples, per_shard)):
        files = {
            name: data for i in range(begin, min(begin + per_shard, samples)) for name, data in tar_files(i).items()
        }
        (folder / f"train-{number:03}{ending}").write_bytes(pack[ending](tarred(files)))
    return folder


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


class Shaky(fsspec.AbstractFileSystem):
    """shaky://PATH is the file /PATH; what it does is in the file `mood` beside it, for all processes."""

    protocol = "shaky"
    cachable = False

    def info(self, path, **kwargs):
        found = Path("/", path).stat()
        return {"name": path, "size": found.st_size, "type": "file"}

    def _open(self, path, mode="rb", **kwargs):
        return ShakyFile(Path("/", path))


class ShakyFile:
    def __init__(self, path):
        self.path, self.at, self.given = path, 0, 0
        self.size = path.stat().st_size
        mood = path.parent / "mood"
        self.mood = json.loads(mood.read_text()) if mood.exists() else {}
        self.wanted = path.suffix != ".json" or self.mood.get("index", False)

    def seek(self, place):
        if self.mood.get("no_seek") and place:
            raise ValueError("cannot seek")
        self.at = place

    def read(self, count):
        mood = self.mood if self.wanted else {}
        if (breaks := mood.get("breaks_after")) is not None:
            if self.given >= breaks:
                raise ConnectionResetError("the connection was lost")
            count = min(count, breaks - self.given)
        if (ends := mood.get("ends_at")) is not None:
            count = min(count, max(0, ends - self.at))
        count = min(count, mood.get("piece", count))
        time.sleep(mood.get("seconds", 0))
        with self.path.open("rb") as file:
            file.seek(self.at)
            data = file.read(count)
        again = fetched(self.path.parent).get(self.path.name, 0) >= mood.get("flips_first", 1 << 60)
        if not again and (flip := mood.get("flips")) is not None and self.at <= flip < self.at + len(data):
            data = bytearray(data)
            data[flip - self.at] ^= 4
            data = bytes(data)
        self.at += len(data)
        self.given += len(data)
        told(self.path.parent, self.path.name, len(data))
        return data

    def close(self):
        pass


def told(folder, name, count):
    descriptor = os.open(folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{name} {count}\n".encode())
    os.close(descriptor)


def fetched(folder):
    """Bytes that were read of each file of a folder through shaky://."""
    counts: dict[str, int] = {}
    if (folder / "log").exists():
        for line in (folder / "log").read_text().splitlines():
            name, count = line.rsplit(" ", 1)
            counts[name] = counts.get(name, 0) + int(count)
    return counts


def mood(folder, **values):
    (folder / "mood").write_text(json.dumps(values))


def used(folder):
    """Bytes in a cache: whole shards, and parts with what is reserved for them."""
    total = 0
    for entry in Path(folder).iterdir():
        if entry.is_file() and entry.name != "lock":
            try:
                total += entry.stat().st_size
            except FileNotFoundError:
                continue
    return total


@contextlib.contextmanager
def watched(folder):
    """The most that is ever in a cache, in a list, looked at all the time while nobody changes names or sizes."""
    most, done, cache = [0], threading.Event(), ShardCache(folder, 1)

    def look():
        while not done.is_set():
            with cache._alone():
                most[0] = max(most[0], used(folder))
            time.sleep(0.001)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


fsspec.register_implementation("shaky", Shaky, clobber=True)
