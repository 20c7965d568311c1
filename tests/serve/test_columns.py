"""Columns hold every row once, in the dtype it came in."""

from __future__ import annotations

import numpy as np
import pytest

from trainfleet.errors import PeerError
from trainfleet.serve.columns import Columns


def answer(rows: int, width: int = 3, **more):
    return {
        "rows": np.array(rows + 1),
        "kept": np.arange(1, rows + 1, dtype=np.int32),
        "classes": np.arange(rows * width, dtype=np.int32).reshape(rows, width),
        **more,
    }


@pytest.mark.parametrize("reserved", [None, 5000, 100_000])
def test_rows_come_back_in_order_however_much_was_reserved(reserved):
    columns = Columns(reserved)
    for begin in range(0, 20_000, 100):
        columns.add(answer(99)["kept"].astype(np.int64) + begin, answer(99))
    assert columns.rows == 19_800 and columns.num_bytes == 19_800 * 20
    found = columns.take()
    assert (found["indices"] == [i for i in range(20_000) if i % 100]).all() and found["indices"].base is None
    assert (found["classes"].reshape(200, 99, 3) == answer(99)["classes"]).all()
    assert columns.rows == 0 and columns.take() == {}


@pytest.mark.parametrize(
    "other", [answer(2, 4), answer(2, values=np.zeros(2, np.float32)), {"kept": answer(2)["kept"]}]
)
def test_other_columns_than_before_are_refused(other):
    columns = Columns()
    columns.add(np.arange(2), answer(2))
    with pytest.raises(PeerError, match="other columns"):
        columns.add(np.arange(2), other)
