"""Distributed checkpoints are joined from their pieces as torch joins them; a hostile one does nothing."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import shutil
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="distributed checkpoints are torch's")
import torch.distributed.checkpoint as torch_dcp  # noqa: E402
from torch.distributed.checkpoint.metadata import (  # noqa: E402
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from trainfleet.checkpoint.foreign.dcp import arrays_in_dcp  # noqa: E402
from trainfleet.errors import CheckpointError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def weights():
    draw = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(5, 3, generator=draw),
        "b": torch.randn(4, generator=draw).bfloat16(),
        "n": torch.tensor(7),
        "none": torch.zeros(0, 3),
    }


def values(arrays):
    return {array.name: (array.dtype, array.shape, array.read().tobytes()) for array in arrays}


def expected(tensors):
    return {
        name: (str(t.dtype)[6:], tuple(t.shape), t.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for name, t in tensors.items()
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dcp")
    state = {"model": weights(), "optim": {"state": {"a": torch.ones(2)}, "lr": 0.1}}
    torch_dcp.save(state, checkpoint_id=folder / "nested", no_dist=True)
    torch_dcp.save({**weights(), "lr": 0.1}, checkpoint_id=folder / "flat", no_dist=True)
    return folder


def test_every_tensor_comes_by_name_and_value(saved):
    arrays, within = arrays_in_dcp(saved / "flat")
    assert values(arrays) == expected(weights()) and within is None


def test_weights_are_found_beside_an_optimizer(saved):
    arrays, within = arrays_in_dcp(saved / "nested")
    assert values(arrays) == expected(weights()) and within == "model"


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        (b"\x80\x04N\x72\xff\xff\xff\x7f.", "more memory than any such file"),  # a memo of 2^31 places
        (b"\x80\x04(" + b"(l" * 10 + b".", "another form|no Metadata|where a Metadata|is not the metadata"),
        (pickle.dumps([1]), "there is a list where a Metadata belongs"),
        (pickle.dumps(Metadata({}, storage_data={})), "holds no tensors"),
        (pickle.dumps(Metadata({}, storage_data=3)), "has another form"),
        (b"", "is not the metadata"),
        (b"\x80", "is not the metadata"),
    ],
)
def test_a_hostile_pickle_ends_in_words_and_soon(tmp_path, metadata, said):
    (tmp_path / ".metadata").write_bytes(metadata)
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match=said):
        arrays_in_dcp(tmp_path)
    assert time.monotonic() - begun < 20


def test_what_would_run_does_not(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match=r"posix\.mkdir, which does not belong there"):
        arrays_in_dcp(tmp_path)
    assert not (tmp_path / "ran").exists()


def described(chunks, shape=(4,), dtype=torch.float32, places=None):
    """A folder's metadata that says this of one tensor `w`."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    entry = TensorStorageMetadata(
        properties=TensorProperties(dtype=dtype),
        size=torch.Size(shape),
        chunks=[ChunkStorageMetadata(offsets=torch.Size(at), sizes=torch.Size(n)) for at, n in chunks],
    )
    places = places or {at: ("__0_0.distcp", 0, 2000) for at, _ in chunks}
    storage = {MetadataIndex("w", at): _StorageInfo(*place) for at, place in places.items()}
    return pickle.dumps(Metadata({"w": entry}, storage_data=storage))


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        (lambda: described([((0,), (3,))]), "leave a hole"),
        (lambda: described([((0,), (3,)), ((2,), (2,))]), "hold the same elements"),
        (lambda: described([((-1,), (5,))]), "does not lie within"),
        (lambda: described([((0,), (2**50,))], (2**50,)), r"has \d+ bytes, and w would need"),
        (lambda: described([((0,), (2**62,))], (2**62,)), "more elements than any memory"),
        (lambda: described([((0,), (4,))], places={(0,): ("../x", 0, 9)}), "not beside it"),
        (lambda: described([((0,), (4,))], places={(0,): ("/etc/passwd", 0, 9)}), "not beside it"),
        (lambda: described([((0,), (4,))], places={(0,): ("absent", 0, 9)}), "absent cannot be read"),
        (lambda: described([((0,), (4,))], places={(0,): ("__0_0.distcp", -1, 2000)}), "from byte -1 on"),
        (lambda: described([((0,), (4,))], places={(0,): ("__0_0.distcp", 0, 1 << 60)}), "cut short, or of another"),
        (lambda: described([((0,), (4,))], places={(1,): ("__0_0.distcp", 0, 2000)}), "has another form"),
    ],
)
def test_numbers_that_cannot_be_are_refused_before_anything_is_read(saved, tmp_path, metadata, said):
    shutil.copy(saved / "flat" / "__0_0.distcp", tmp_path)
    (tmp_path / ".metadata").write_bytes(metadata())
    with pytest.raises(CheckpointError, match=said):
        arrays_in_dcp(tmp_path)


def test_a_file_of_something_else_is_named(saved, tmp_path):
    torch.save(torch.zeros(3), tmp_path / "__0_0.distcp")
    size = (tmp_path / "__0_0.distcp").stat().st_size
    (tmp_path / ".metadata").write_bytes(described([((0,), (4,))], places={(0,): ("__0_0.distcp", 0, size)}))
    ((array,), _) = arrays_in_dcp(tmp_path)
    with pytest.raises(CheckpointError, match=r"is \('float32', \(3,\)\); the metadata says"):
        array.read()


@pytest.mark.filterwarnings("ignore")
def test_damage_is_an_error_in_words_and_nothing_else(saved, tmp_path):
    chance = random.Random(0)
    place = tmp_path / "dcp"
    shutil.copytree(saved / "nested", place)
    whole = {file: file.read_bytes() for file in place.iterdir()}
    refused = 0
    for _ in range(50):
        file = place / chance.choice([".metadata", ".metadata", "__0_0.distcp"])
        data = bytearray(whole[file])
        at = chance.randrange(len(data))
        match chance.randrange(3):
            case 0:
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                del data[at:]
            case _:
                data[at : at + 8] = b"\xff" * 8
        file.write_bytes(data)
        refused += 1
        with contextlib.suppress(CheckpointError):  # without digests of their own, wrong numbers may pass
            for array in arrays_in_dcp(place)[0]:
                array.read()
            refused -= 1
        file.write_bytes(whole[file])
    assert refused > 10
