"""`trainfleet replay` asks for a step of a run and shows what came of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from trainfleet.cli.main import main
from trainfleet.training import replay as again
from trainfleet.training.replay import Replayed, places_of_modules

FOUND = Replayed(
    step=812,
    began=800,
    nproc=1,
    loss=0.5,
    grad_norm=1.5,
    recorded=0.25,
    first_other=810,
    parts=[],
    finding=None,
    remarks=("A remark.",),
)


@pytest.fixture
def replay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*arguments: str) -> tuple[list[Any], object, str, str]:
        asked: list[Any] = []

        def replayed(run: Path, step: int, **more: Any) -> Replayed:
            more.pop("tell")("step 801 of 812: loss 0.5")
            asked.append((str(run), step, more))
            return FOUND

        monkeypatch.setattr(again, "replay", replayed)
        with pytest.raises(SystemExit) as ended:
            main(["replay", *arguments])
        told = capsys.readouterr()
        return asked, ended.value.code, told.out, told.err

    return run


def test_the_report_is_printed_and_progress_goes_to_standard_error(replay: Any) -> None:
    asked, code, out, err = replay("runs/a", "--step", "812", "data.workers=0")
    plain = {"nproc": None, "batch": None, "overrides": ["data.workers=0"], "feeders": (), "certificates": None}
    assert asked == [("runs/a", 812, plain)] and code == 0
    assert "step 812 again, from the checkpoint of step 800, on 1 process" in out and "note: A remark." in out
    assert "the run's loss was 0.25, which is 1.0e+00 off; the first step on the way to differ was 810" in out
    assert "Everything in it was finite." in out and err == "step 801 of 812: loss 0.5\n"


def test_feeders_are_told(replay: Any) -> None:
    asked, *_ = replay("runs/a", "--step", "1", "--feed", "here:7700", "--feed", "there:7700", "--certs", "keys")
    assert asked[0][2]["feeders"] == ["here:7700", "there:7700"] and asked[0][2]["certificates"] == Path("keys")
    asked, code, _, err = replay("runs/a", "--step", "1", "--certs", "keys")
    assert not asked and code == 2 and "--certs is for --feed, which is not given" in err


def test_programs_get_json(replay: Any) -> None:
    asked, _, out, _ = replay("runs/a", "--step", "1", "--nproc", "2", "--batch", "b.safetensors", "--json")
    assert asked[0][2]["nproc"] == 2 and asked[0][2]["batch"] == Path("b.safetensors")
    told = json.loads(out)
    assert (told["loss"], told["recorded_loss"], told["same_loss"], told["first_other_step"]) == (0.5, 0.25, False, 810)


def test_modules_of_the_recipe_are_looked_for_where_the_run_found_them(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    command = ["trainfleet", "train", str(tmp_path / "recipes" / "a.yaml"), "plan.zero=2", str(tmp_path / "recipes")]
    (tmp_path / "environment.json").write_text(json.dumps([{"command": command}]))
    assert places_of_modules(tmp_path) == [tmp_path / "recipes", tmp_path / "recipes"]
    assert places_of_modules(tmp_path / "none") == []
