"""The sequence of a batch is found by its shape, cut, and what cannot be cut is refused with its remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rank_pool import RankPools

from trainfleet.errors import DataError
from trainfleet.mesh import Mesh
from trainfleet.parallel.context.sequence import described, length_of, split_sequences
from trainfleet.plan import Plan


def test_the_length_is_dimension_1_of_the_first_array_that_has_one() -> None:
    batch = {"weight": torch.ones(3), "input": torch.ones(3, 8), "more": torch.ones(3, 5)}
    assert length_of(batch, 4, strict=True) == 8
    assert length_of(batch, 3, strict=False) is None
    with pytest.raises(DataError, match=r"plan\.cp=3 does not divide the 8 positions .* cp = 1, 2, 4, 8"):
        length_of(batch, 3, strict=True)
    with pytest.raises(DataError, match="no array of the batch has two dimensions"):
        length_of([torch.ones(4)], 2, strict=True)


def test_what_is_split_is_said() -> None:
    said = described({"input": torch.ones(3, 8), "mask": torch.ones(3, 1, 8, 8)}, 8)
    assert said == "of a batch, arrays [3, 8] are split along dimension 1, [3, 1, 8, 8] are whole on each"


def pieces() -> list[Any]:
    with Mesh.from_env(Plan(cp=2)) as mesh:
        batch = {"a": torch.arange(8).view(2, 4), "b": (torch.ones(2), torch.arange(24.0).view(2, 4, 3)), "c": "text"}
        cut = split_sequences(batch, mesh.torch["cp"], 4)
        return [cut["a"].to_local().tolist(), cut["b"][1].full_tensor().tolist(), type(cut["b"][0]) is torch.Tensor]


def test_each_rank_takes_its_piece_and_leaves_the_rest_whole(ranks: RankPools) -> None:
    found = ranks(2, pieces)
    assert found[0][0] == [[0, 1], [4, 5]]
    assert found[1][0] == [[2, 3], [6, 7]]
    assert all(each[1] == torch.arange(24.0).view(2, 4, 3).tolist() and each[2] for each in found)
