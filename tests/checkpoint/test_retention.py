from __future__ import annotations

import pytest

from trainfleet.checkpoint import Retention
from trainfleet.errors import ConfigError


def test_the_last_and_one_of_each_so_many_are_kept():
    assert Retention(last=2).removable([1, 2, 3, 4]) == [1, 2]
    assert Retention(last=2, every=20).removable([10, 20, 30, 40, 50]) == [10, 30]
    assert Retention(last=3).removable([5, 6]) == []


def test_last_means_the_order_of_commits_and_not_of_steps():
    assert Retention(last=1).removable([100, 200, 50]) == [100, 200]


@pytest.mark.parametrize("arguments", [{"last": 0}, {"every": 0}, {"last": -1}])
def test_keeping_nothing_is_refused(arguments):
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        Retention(**arguments)
