"""Tests of messages between stages."""

from __future__ import annotations

import pytest
import torch

from trainfleet.errors import PlanError
from trainfleet.parallel.pipeline.graph import Kind
from trainfleet.parallel.pipeline.wire import Message


def test_a_message_brings_back_every_bit_of_any_dtype_and_layout() -> None:
    tensors = [
        torch.randn(3, 5).T,  # not contiguous
        torch.randint(9, (7,)),
        torch.tensor(True),
        torch.randn(2, 3, dtype=torch.bfloat16),
        torch.randn(2, dtype=torch.complex64),
        torch.empty(0, 4),
    ]
    message = Message([Kind(tuple(t.shape), t.dtype, False) for t in tensors], head_bytes=3)
    head = torch.tensor([1, 0, 255], dtype=torch.uint8)
    buffer = message.packed(tensors, "cpu", head)
    assert buffer.dtype == torch.uint8
    assert len(buffer) == message.num_bytes
    got_head, got = message.unpacked(buffer)
    assert torch.equal(got_head, head)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, tensors, strict=True))


def test_what_is_missing_travels_as_zeros() -> None:
    message = Message([Kind((2,), torch.float32, True)])
    _, (got,) = message.unpacked(message.packed([None], "cpu").fill_(0))
    assert not got.any()


@pytest.mark.parametrize("tensor", [torch.zeros(3), torch.zeros(2, dtype=torch.float64)])
def test_a_tensor_of_another_kind_than_agreed_is_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(PlanError, match="where the example says"):
        Message([Kind((2,), torch.float32, True)]).packed([tensor], "cpu")
