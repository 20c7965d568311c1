from __future__ import annotations

from pathlib import Path

from trainfleet.events import Noted, Restored
from trainfleet.monitor.samples import Samples


def test_texts_are_appended_as_they_are(tmp_path: Path) -> None:
    for step in (1, 2):
        samples = Samples(tmp_path / "samples.txt")
        samples.on_event(Noted(step=step, title="generated", text="def f():\n\treturn\x00"))
        samples.on_event(Restored(step=1, path="x"))
        samples.close()
    written = (tmp_path / "samples.txt").read_text()
    assert written.count("def f():\n\treturn\x00\n\n") == 2 and "── step 2: generated ──" in written
