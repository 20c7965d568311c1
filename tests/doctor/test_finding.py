from __future__ import annotations

import dataclasses

import pytest

from trainfleet.doctor.finding import Finding


def test_a_finding_is_well_unless_told_otherwise_and_never_changes():
    finding = Finding(subject="disk", fact="75 GiB free")
    assert (finding.verdict, finding.remedy) == ("ok", "")
    with pytest.raises(dataclasses.FrozenInstanceError):
        finding.verdict = "no"  # type: ignore[misc]
