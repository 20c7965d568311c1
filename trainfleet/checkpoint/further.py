"""Further files of a checkpoint, made of its shards before it is published: an export, what a save function writes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from trainfleet.checkpoint.export import PRECISIONS, safetensors_of
from trainfleet.checkpoint.manifest import ListedFile
from trainfleet.checkpoint.names import Attempt
from trainfleet.checkpoint.sealed import RunningDigest
from trainfleet.checkpoint.settings import Export
from trainfleet.checkpoint.shard import Index
from trainfleet.checkpoint.whole import whole_states
from trainfleet.errors import CheckpointError, NotStored, StoreError
from trainfleet.store import Buffer, Store

SaveFunction: TypeAlias = Callable[[dict[str, Any], int, Path], object]
"""(state, step, path): writes one further file at `path`, with any suffix, or a folder of files.

`state` is what the Statefuls gave, by their names, with whole arrays on the CPU, however many ranks there are."""

EXPORTED = "model.safetensors"
_READ_BYTES = 4 << 20


def further_files(
    store: Store, attempt: Attempt, indexes: list[Index], export: Export | None, save_function: SaveFunction | None
) -> list[ListedFile]:
    """Store them beside the shards; what the manifest says of them."""
    found = []
    if export is not None:
        chunks = safetensors_of(store, indexes, dtype=PRECISIONS[export])
        found.append(_stored(store, attempt.further(EXPORTED), chunks))
    if save_function is not None:
        with tempfile.TemporaryDirectory(prefix="trainfleet-save-") as folder:
            try:
                save_function(whole_states(store, indexes), attempt.step, Path(folder) / "custom")
            except Exception as error:
                name = getattr(save_function, "__name__", type(save_function).__name__)
                raise CheckpointError(f"The save function {name} failed: {type(error).__name__}: {error}") from error
            written = _files_below(Path(folder))
            if not written:
                raise CheckpointError("The save function wrote nothing at the path it was given; write a file there.")
            for file in written:
                name = file.relative_to(folder).as_posix()
                found.append(_stored(store, attempt.further(name), _bytes_of(file)))
    return found


def verify_further(store: Store, files: Sequence[ListedFile]) -> list[str]:
    """Read them all; what is wrong, by file."""
    problems = []
    for file in files:
        digest = RunningDigest()
        try:
            with store.open(file.name) as opened:
                if opened.size != file.num_bytes:
                    problems.append(f"{file.name}: has {opened.size} bytes; {file.num_bytes} were written")
                    continue
                buffer = bytearray(_READ_BYTES)
                for start in range(0, opened.size, _READ_BYTES):
                    part = memoryview(buffer)[: min(_READ_BYTES, opened.size - start)]
                    opened.read_into(start, part)
                    digest.update(part)
        except NotStored:
            problems.append(f"{file.name}: missing")
        except StoreError as error:
            problems.append(f"{file.name}: {error}")
        else:
            if str(digest) != file.digest:
                problems.append(f"{file.name}: does not match its digest in the manifest")
    return problems


def _stored(store: Store, name: str, chunks: Iterable[Buffer]) -> ListedFile:
    digest = RunningDigest()

    def digested() -> Iterator[Buffer]:
        for chunk in chunks:
            digest.update(chunk)
            yield chunk

    return ListedFile(name=name, num_bytes=store.put(name, digested()), digest=str(digest))


def _files_below(folder: Path) -> list[Path]:
    return sorted(Path(place) / name for place, _, names in os.walk(folder) for name in names)


def _bytes_of(file: Path) -> Iterator[bytes]:
    with file.open("rb") as opened:
        while chunk := opened.read(_READ_BYTES):
            yield chunk
