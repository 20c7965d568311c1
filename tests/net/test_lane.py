from __future__ import annotations

import random
from datetime import timedelta

import pytest

from trainfleet.net.conditions import SEGMENT_BYTES, Conditions
from trainfleet.net.lane import QUEUE_SECONDS, Bottleneck, End, Lane


def ms(count: float) -> timedelta:
    return timedelta(milliseconds=count)


def drained(lane: Lane) -> list[tuple[float, bytes | End]]:
    """All pieces under way with the times they are due, as the receiver gets them."""
    arrived: list[tuple[float, bytes | End]] = []
    while (due := lane.next_due()) is not None:
        piece = lane.first()
        arrived.append((due, piece if isinstance(piece, End) else bytes(piece)))
        lane.arrived(0 if isinstance(piece, End) else len(piece))
    return arrived


def sent_through(conditions: Conditions, stream: bytes, cuts: list[int], seed: str = "1") -> tuple[bytes, Lane]:
    lane = Lane(conditions, Bottleneck(None), seed)
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        lane.take(stream[begin:end], 0.0, more_follows=True)
    return b"".join(piece for _, piece in drained(lane) if isinstance(piece, bytes)), lane


def test_bytes_come_after_the_delay_and_in_order_whatever_jitter_says():
    lane = Lane(Conditions(delay=ms(10), jitter=ms(8)), Bottleneck(None), "1")
    for number in range(200):
        lane.take(bytes([number]), number / 1000, more_follows=True)
    lane.end(End.CLOSED, 0.2)
    arrived = drained(lane)
    times = [due for due, _ in arrived]
    assert times == sorted(times)
    assert [piece for _, piece in arrived] == [*(bytes([number]) for number in range(200)), End.CLOSED]
    late = [due - number / 1000 for number, (due, _) in enumerate(arrived[:-1])]
    assert min(late) >= 0.010 and max(late) <= 0.018 + 1e-9 and max(late) - min(late) > 0.004


def test_a_rate_is_shared_by_all_lanes_of_a_direction():
    shared = Bottleneck(8e6)  # a byte a microsecond
    lanes = [Lane(Conditions(), shared, str(number)) for number in range(2)]
    for lane in lanes:
        lane.take(bytes(1000), 0.0, more_follows=False)
    assert [lane.next_due() for lane in lanes] == [pytest.approx(0.001), pytest.approx(0.002)]


def test_an_idle_bottleneck_saves_nothing_up():
    bottleneck = Bottleneck(8e6)
    assert bottleneck.pass_through(1000, 0.0) == pytest.approx(0.001)
    assert bottleneck.pass_through(1000, 5.0) == pytest.approx(5.001)


def test_a_bottleneck_lets_no_more_in_than_its_queue_holds():
    bottleneck, now = Bottleneck(8e6), 0.0
    while bottleneck.open_at() <= now:
        bottleneck.pass_through(bottleneck.slice_bytes(), now)
    assert QUEUE_SECONDS <= bottleneck.free_at < QUEUE_SECONDS + 0.003


def test_a_lane_is_full_when_a_round_trip_of_bytes_is_under_way():
    lane = Lane(Conditions(delay=ms(50)), Bottleneck(80e6), "1")  # 10 MB/s
    while lane.has_room():
        lane.take(bytes(lane.slice_bytes()), 0.0, more_follows=True)
    assert 1.0e6 < lane.num_bytes < 1.6e6
    _, lane = sent_through(Conditions(), bytes(5 << 20), [])
    assert lane.limit_bytes == 4 << 20 and lane.num_bytes == 0


def test_a_lost_segment_holds_up_all_behind_it_by_a_round_trip():
    lane = Lane(Conditions(delay=ms(10), loss=0.02), Bottleneck(None), "1")
    for number in range(300):
        lane.take(bytes(SEGMENT_BYTES), number * 1e-3, more_follows=True)
    late = [due - number * 1e-3 for number, (due, _) in enumerate(drained(lane))]
    assert lane.lost_segments > 1
    assert max(late) > 0.029  # 10 ms, and a round trip of 20
    blocked = [x for x in late if x > 0.0101]
    assert len(blocked) > lane.lost_segments * 5, "a loss delays what comes behind it too"


def test_a_lost_segment_with_nothing_behind_it_takes_a_probe():
    lane = Lane(Conditions(delay=ms(10), loss=0.5), Bottleneck(None), "1")
    late = []
    for number in range(20):
        lane.take(b"ask", float(number), more_follows=False)
        late.append(drained(lane)[0][0] - number)
    assert sum(x == pytest.approx(0.010, abs=1e-4) for x in late) == 20 - lane.lost_segments
    assert sum(x > 0.25 for x in late) == lane.lost_segments > 0


@pytest.mark.parametrize("what", ["loss", "corruption"])
def test_the_same_bytes_meet_the_same_fate_however_the_stream_was_cut(what):
    stream = random.Random(3).randbytes(200_000)
    bad = Conditions(delay=ms(1), **{what: 1e-3 if what == "corruption" else 0.05})
    whole, one = sent_through(bad, stream, [])
    pieces, other = sent_through(bad, stream, sorted(random.Random(4).sample(range(1, len(stream)), 500)))
    assert whole == pieces
    assert (one.lost_segments, one.flipped_bits) == (other.lost_segments, other.flipped_bits) != (0, 0)
    changed, _ = sent_through(bad, stream, [], seed="2")
    assert what == "loss" or changed != whole


@pytest.mark.parametrize("probability", [1e-3, 0.2, 0.9])
def test_bits_are_flipped_as_often_as_was_said(probability):
    stream = bytes(100_000)
    arrived, lane = sent_through(Conditions(corruption=probability), stream, [])
    hit = [byte for byte in arrived if byte]
    assert len(hit) == lane.flipped_bits == pytest.approx(100_000 * probability, rel=0.25)
    assert all(byte.bit_count() == 1 for byte in hit) and len(set(hit)) == 8


def test_the_first_byte_is_hit_as_often_as_any():
    firsts = [sent_through(Conditions(corruption=0.5), b"\0", [], seed=str(seed))[0] for seed in range(100)]
    assert 25 < sum(first != b"\0" for first in firsts) < 75


def test_segments_are_lost_as_often_as_was_said():
    _, lane = sent_through(Conditions(delay=ms(1), loss=0.1), bytes(SEGMENT_BYTES * 5000), [])
    assert lane.lost_segments == pytest.approx(500, rel=0.2)


def test_what_the_receiver_did_not_take_stays_first():
    lane = Lane(Conditions(), Bottleneck(None), "1")
    lane.take(b"abcdef", 1.0, more_follows=False)
    lane.take(b"gh", 1.0, more_follows=False)
    lane.arrived(4)
    assert bytes(lane.first()) == b"ef" and lane.num_bytes == 4  # type: ignore[arg-type]
    assert lane.forget() == 4 and lane.next_due() is None and lane.num_bytes == 0
