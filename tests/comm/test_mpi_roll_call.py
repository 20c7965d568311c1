"""The sentence of a roll call; `test_mpi_group` hears it from ranks."""

from __future__ import annotations

import numpy as np

from trainfleet.comm.mpi_roll_call import RollCall


class Mail:
    """Of three ranks, this is rank 0; what the others would send lies in `letters`, by source and kind."""

    rank, size = 0, 3

    def __init__(self, letters):
        self.letters = letters
        self.sent = []

    def Iprobe(self, source, tag):
        return (source, tag) in self.letters

    def Irecv(self, buffer, source, tag):
        text = self.letters.pop((source, tag))
        buffer[: len(text)] = np.frombuffer(text, np.uint8)
        buffer[len(text)] = 0
        return self

    def Isend(self, words, to, tag):
        self.sent.append((to, tag, bytes(words)))
        return self

    def Test(self):
        return True


def test_those_who_answer_otherwise_and_those_who_do_not_are_named():
    mail = Mail({(2, 2): b'"barrier along tp"'})
    error = RollCall(mail, "dp").call("all_gather", 3.0)
    assert str(error).startswith("Rank 0 of 3 along dp called all_gather and waited 3.0 s; rank 1 did not come")
    assert str(error).endswith("; rank 2 waits in barrier along tp.")
    assert [(to, tag) for to, tag, _ in mail.sent] == [(1, 1), (2, 1), (1, 3), (2, 3)]


def test_where_all_wait_alike_it_is_only_slow():
    mail = Mail({(1, 2): b'"all_gather"', (2, 2): b'"all_gather"'})
    assert "all others wait in the same call" in str(RollCall(mail, "").call("all_gather", 3.0))
