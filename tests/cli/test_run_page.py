from __future__ import annotations

from pathlib import Path

import pytest

from trainfleet.cli.run_page import MOST_LETTERS, MOST_ROWS, print_comparison, print_run
from trainfleet.monitor.history import compare, read_run


def test_a_run_that_has_not_begun_is_a_short_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").touch()
    print_run(read_run(tmp_path), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("not begun, 0 steps") and len(lines) <= 3


def test_pages_stay_short_however_many_settings_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").touch()
        settings = "".join(f"  key{n}: {name}{'x' * 500}\n" for n in range(1000))
        (tmp_path / name / "recipe.yaml").write_text(f"args:\n{settings}")
        runs.append(read_run(tmp_path / name))
    print_run(runs[0], {})
    print_comparison(["a", "b"], runs, compare(runs))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 3 * MOST_ROWS and max(map(len, lines)) < 3 * MOST_LETTERS
    assert sum("and 960 more, which --json has" in line for line in lines) == 2
