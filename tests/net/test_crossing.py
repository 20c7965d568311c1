from __future__ import annotations

from trainfleet.net.crossing import Counters


def test_counters_say_only_what_was():
    assert str(Counters(connections=1, bytes_up=1200)) == "1 connection, 1,200 bytes up, 0 bytes down"
    said = str(Counters(connections=3, refused=1, reset=2, swallowed_bytes=5000, lost_segments=4, flipped_bits=6))
    assert said.startswith("3 connections, ")
    assert said.endswith("1 refused by the target, 2 reset, 5,000 bytes swallowed, 4 segments late, 6 bits flipped")
