"""A spell is told when it begins, and when it is over."""

from __future__ import annotations

from trainfleet.monitor.anomalies import Spell


def test_a_spell_begins_once_and_ends_once() -> None:
    spell = Spell()
    assert [spell.begins(3), spell.begins(4), spell.ends(), spell.ends(), spell.begins(9)] == [
        True,
        False,
        3,
        None,
        True,
    ]


def test_a_spell_that_comes_back_soon_was_not_over() -> None:
    spell = Spell(calm=2)
    spell.begins(1)
    assert spell.ends() is None and not spell.begins(3)
    assert spell.ends() is None and spell.ends() == 1
