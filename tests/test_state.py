"""ShardedArray, PerRank and the recognition of tensors."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from trainfleet.state import PerRank, ShardedArray, Stateful, is_tensor


def piece(shape, offsets, whole, **more):
    return ShardedArray(name="w", global_shape=whole, offsets=offsets, local=np.zeros(shape, np.float32), **more)


def test_a_piece_tells_its_shape_and_its_dtype_without_the_library():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    assert piece((2, 3), (0, 3), (2, 6)).shape == (2, 3)
    assert piece((2, 3), (0, 3), (2, 6)).dtype == "float32"
    tensor = torch.zeros(2, dtype=torch.bfloat16)
    assert ShardedArray(name="w", global_shape=(2,), offsets=(0,), local=tensor).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("shape", "offsets", "whole"), [((2,), (3,), (4,)), ((2,), (-1,), (4,)), ((5, 1), (0, 0), (4, 1))]
)
def test_a_piece_outside_the_whole_is_refused(shape, offsets, whole):
    with pytest.raises(ValueError, match=r"'w'.*within"):
        piece(shape, offsets, whole)


@pytest.mark.parametrize(("offsets", "whole"), [((0,), (4, 4)), ((0, 0), (4,)), ((), ())])
def test_dimensions_must_agree(offsets, whole):
    with pytest.raises(ValueError, match="one number a dimension"):
        piece((2, 2), offsets, whole)


def test_an_empty_piece_may_lie_at_the_end_or_past_it():
    assert piece((0, 3), (4, 0), (4, 3)).shape == (0, 3)
    assert piece((0, 3), (6, 0), (4, 3)).shape == (0, 3)


def test_scalars_are_whole_pieces():
    assert piece((), (), ()).shape == ()


def test_a_stateful_is_known_by_its_two_methods():
    class Counter:
        def state_dict(self):
            return {"n": PerRank(1)}

        def load_state_dict(self, state):
            pass

    assert isinstance(Counter(), Stateful)
    assert not isinstance({}, Stateful)


def test_tensors_are_told_from_arrays():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    assert is_tensor(torch.zeros(1))
    assert is_tensor(torch.nn.Parameter(torch.zeros(1)))
    assert not is_tensor(np.zeros(1))
    assert not is_tensor(torch)


def test_asking_does_not_import_torch():
    code = "import sys, trainfleet.state as s; assert not s.is_tensor(1); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
