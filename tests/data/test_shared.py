from __future__ import annotations

import gc
import mmap
import os
from multiprocessing import Pipe

import numpy as np
import pytest

from trainfleet.data.shared import INLINE_BYTES, MAX_FREE, Receiver, Sender, anonymous_file


@pytest.fixture
def ends():
    ours, theirs = Pipe(duplex=True)
    yield Sender(theirs), Receiver(ours)
    ours.close(), theirs.close()


def pass_on(sender, receiver, body):
    sender.send("head", body)
    head, unpack = receiver.recv()
    assert head == "head"
    return unpack()


@pytest.mark.parametrize("rows", [1, INLINE_BYTES])
def test_what_is_sent_arrives_and_can_be_written_to(ends, rows):
    body = {"x": np.arange(rows), "empty": np.zeros((0, 3)), "turned": np.ones((rows, 3)).T, "text": ["a", b"b", None]}
    got = pass_on(*ends, body)
    assert got["text"] == body["text"] and got["empty"].shape == (0, 3)
    assert (got["x"] == body["x"]).all() and (got["turned"] == 1).all()
    got["x"][0] = 7
    assert got["x"][0] == 7 and body["x"][0] == 0


def test_a_buffer_is_free_when_the_last_view_of_it_is_gone(ends):
    sender, receiver = ends
    first = pass_on(sender, receiver, {"x": np.zeros(INLINE_BYTES), "y": np.zeros(9)})
    view = first["x"][5:9]
    del first
    gc.collect()
    assert receiver.take_free() == []
    del view
    gc.collect()
    assert receiver.take_free() == [0]


def test_free_buffers_are_written_again_and_others_are_not(ends):
    sender, receiver = ends
    held = pass_on(sender, receiver, np.zeros(INLINE_BYTES))
    for value in range(1, 5):
        batch = pass_on(sender, receiver, np.full(INLINE_BYTES, value, float))
        assert batch[-1] == value and held[-1] == 0
        del batch
        sender.free_(receiver.take_free())
    assert sorted(receiver._buffers) == [0, 1]


def test_buffers_that_are_too_small_or_too_many_are_given_up(ends):
    sender, receiver = ends
    held = [pass_on(sender, receiver, np.zeros(INLINE_BYTES)) for _ in range(MAX_FREE + 5)]
    del held
    sender.free_(receiver.take_free())
    pass_on(sender, receiver, np.zeros(INLINE_BYTES))
    assert len(receiver._buffers) == len(sender._buffers) == MAX_FREE + 1
    sender.free_(receiver.take_free())
    pass_on(sender, receiver, np.zeros(INLINE_BYTES * 8))
    assert len(receiver._buffers) == len(sender._buffers) == 1


def test_tensors_travel_without_files_of_their_own(ends):
    torch = pytest.importorskip("torch")
    tensors = {
        "strided": torch.arange(12.0).reshape(3, 4).T,
        "half": torch.full((INLINE_BYTES,), 1.5, dtype=torch.bfloat16),
        "scalar": torch.tensor(3, dtype=torch.int16),
        "with_gradient": torch.ones(2, requires_grad=True),
    }
    got = pass_on(*ends, tensors)
    for name, tensor in tensors.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor.detach())


def test_an_anonymous_file_is_zeroed_and_has_no_name():
    descriptor = anonymous_file(5000)
    with mmap.mmap(descriptor, 0) as memory:
        assert len(memory) >= 5000 and not any(memory[:5000])
    assert os.fstat(descriptor).st_nlink == 0
    os.close(descriptor)
