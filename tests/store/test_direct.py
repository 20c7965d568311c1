import errno
import fcntl
import os
import random
from pathlib import Path

import pytest

from trainfleet.store.direct import BUFFER_BYTES, DirectFile

SIZES = [0, 1, 4096, BUFFER_BYTES - 1, BUFFER_BYTES, BUFFER_BYTES + 1, 2 * BUFFER_BYTES + 777]


def written(place: Path, data: bytes, seed: int = 0) -> bytes:
    """What stands in a file after `data` went there in chunks of any size."""
    descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        file, draw, rest = DirectFile(descriptor), random.Random(seed), memoryview(data)
        while rest:
            count = draw.choice([1, 100, 5000, 1 << 20, BUFFER_BYTES, 2 * BUFFER_BYTES])
            file.write(rest[:count])
            rest = rest[count:]
        file.finish()
        assert file.num_bytes == len(data)
    finally:
        os.close(descriptor)
    return place.read_bytes()


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.mark.parametrize("size", SIZES)
def test_all_bytes_arrive_in_their_order(tmp_path, size):
    data = random.Random(size).randbytes(size)
    assert written(tmp_path / "x", data, size) == data


def test_whole_buffers_go_past_the_page_cache_and_the_rest_through_it(tmp_path, monkeypatch):
    write, seen = os.write, []

    def watched(descriptor, data):
        seen.append((is_direct(descriptor), len(data)))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", watched)
    data = random.Random(0).randbytes(2 * BUFFER_BYTES + 777)
    assert written(tmp_path / "x", data) == data
    if seen[0] != (True, BUFFER_BYTES):
        pytest.skip("the file system of the tests has no direct writing")
    assert seen == [(True, BUFFER_BYTES)] * 2 + [(False, 777)]


def test_where_the_file_system_refuses_the_flag_all_goes_through_the_cache(tmp_path, monkeypatch):
    control = fcntl.fcntl

    def refusing(descriptor, command, argument=0):
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return control(descriptor, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refusing)
    data = random.Random(1).randbytes(2 * BUFFER_BYTES + 5)
    assert written(tmp_path / "x", data) == data


@pytest.mark.parametrize("taken", [0, 1000, BUFFER_BYTES // 2 + 1])
def test_a_device_that_takes_a_part_and_refuses_the_rest_gets_it_through_the_cache(tmp_path, monkeypatch, taken):
    write, refused = os.write, []

    def picky(descriptor, data):
        if not is_direct(descriptor):
            return write(descriptor, data)
        if len(data) < BUFFER_BYTES or not taken:
            refused.append(len(data))
            raise OSError(errno.EINVAL, "Invalid argument")
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)
        count = write(descriptor, data[:taken])
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_DIRECT)
        return count

    monkeypatch.setattr(os, "write", picky)
    data = random.Random(2).randbytes(3 * BUFFER_BYTES + 5)
    assert written(tmp_path / "x", data) == data
    assert len(refused) <= 1  # it is not tried again


def test_other_errors_are_not_taken_for_a_refusal(tmp_path, monkeypatch):
    def failing(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", failing)
    with pytest.raises(OSError, match="No space"):
        written(tmp_path / "x", bytes(BUFFER_BYTES))
