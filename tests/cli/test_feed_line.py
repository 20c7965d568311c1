"""A feeder's line says how fast it is, where its time goes, and when the epoch is over."""

from __future__ import annotations

import re
import time
from datetime import timedelta

import pytest
from data.feed.made import Numbers, local
from tried import found_in_one_of_three

from trainfleet.cli.feed_line import FeedLine
from trainfleet.data.feed import DataService, RemoteBatches


class Slow(Numbers):
    def __getitem__(self, index):
        time.sleep(0.002)
        return super().__getitem__(index)


def slow(sample):
    time.sleep(0.001)
    return sample


def numbers_in(words: str) -> dict[str, int]:
    return {name: int(percent) for percent, name in re.findall(r"(\d+)% (source|transform|network|waits)", words)}


@found_in_one_of_three
def test_rates_where_the_time_goes_and_the_rest_of_the_epoch_are_said() -> None:
    stream = local(Slow(400), transform=slow, workers=1)
    with DataService(stream, address="127.0.0.1:0").open() as service:
        line = FeedLine(service)
        assert line() == "0.0 batches/s  0 B/s  0 connections  0 waiting  0 batches" and line.whole == ""
        with RemoteBatches(str(service.address), as_numpy=True, timeout=timedelta(seconds=20)) as batches:
            for _ in range(25):
                next(batches)
            words = line()
        assert re.match(r"\d+\.\d batches/s  [\d.]+ [kM]?B/s  \d+% source ", words)
        assert re.search(r"trainers  epoch 1 at \d+%, 0:0\d left  1 connection  \d+ waiting  \d+ batches$", words)
        reached = int(re.search(r"epoch 1 at (\d+)%", words)[1])  # type: ignore[index]
        assert 50 <= reached <= 90, "25 of 50 batches were taken, and some are ahead"
        for told in (words, line.whole):
            parts = numbers_in(told)
            assert sum(parts.values()) == 100 and parts["source"] == pytest.approx(2 * parts["transform"], rel=0.4)
            assert parts["source"] > 35 and parts["network"] < 30


def test_a_line_of_several_trainers_counts_them_all() -> None:
    with DataService(local(), address="127.0.0.1:0").open() as service:
        line = FeedLine(service)
        place, soon = str(service.address), timedelta(seconds=20)
        with (
            RemoteBatches(place, as_numpy=True, timeout=soon) as one,
            RemoteBatches(place, as_numpy=True, timeout=soon) as other,
        ):
            next(one), next(other)
            assert "2 connections" in line()
