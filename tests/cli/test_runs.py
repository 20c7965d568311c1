from __future__ import annotations

import csv
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from trainfleet.cli.main import main
from trainfleet.events import Evaluated, Event, RunEnded, RunStarted, StepEnded, Tracked
from trainfleet.monitor.jsonl import JsonLines
from trainfleet.monitor.run_folder import RunFolder

RECIPE = "train: {steps: 6, seed: %d}\nmodel: {args: {width: 4}}\nfolder: x\n"


def started(step: int = 0) -> RunStarted:
    return RunStarted(folder="x", steps=6, start_step=step, world_size=2, parameters=1234, plan="zero=2 fp32")


def step(number: int, loss: float = 2.0, **fields: Any) -> StepEnded:
    known = {"learning_rate": 0.1, "grad_norm": 1.0, "samples": 4, "tokens": 64, "seconds": 0.5, "data_seconds": 0.1}
    return StepEnded(step=number, loss=loss, **{**known, "memory_bytes": 5_000_000, **fields})


def write(folder: Path, *events: Event, seed: int = 0) -> Path:
    RunFolder(folder).create()
    RunFolder(folder).write_recipe(RECIPE % seed)
    RunFolder(folder).write_environment(world_size=2, device="cpu")
    log = JsonLines(folder / "metrics.jsonl")
    for event in events:
        log.on_event(event)
    log.close()
    return folder


def whole(loss: float = 2.0) -> list[Event]:
    phases = {"data": 0.1, "forward": 0.2, "backward": 0.2}
    steps = [step(n, loss + 1 / n, phases=phases) for n in range(1, 7)]
    evaluated = Evaluated(step=6, loss=loss, seconds=0.1)
    return [started(), *steps, evaluated, RunEnded(step=6, reason="finished", seconds=3.0)]


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, ("runs", *arguments))))
    return int(ended.value.code or 0)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command and gives what it printed."""

    def say(*arguments: str | Path, code: int = 0) -> str:
        assert run(*arguments) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    return say


def test_list_shows_every_run_below_a_folder_and_hides_none(tmp_path: Path, said: Any) -> None:
    write(tmp_path / "good", *whole())
    write(tmp_path / "group" / "killed", started(), step(1), step(2))
    (tmp_path / "silent").mkdir()
    RunFolder(tmp_path / "silent").write_recipe("{}\n")
    (tmp_path / "no_run").mkdir()
    hold = RunFolder(write(tmp_path / "goes_on", started(), step(1))).hold()
    lines = said("list", tmp_path).splitlines()
    hold.close()
    ends = {Path(line.split()[0]).name: line for line in lines[1:]}
    assert ends.keys() == {"good", "killed", "silent", "goes_on"}
    assert ends["good"].endswith("finished") and " 6/6 " in ends["good"] and " 128 " in ends["good"]
    assert ends["killed"].endswith("ended without a word") and ends["goes_on"].endswith("running")
    assert "has no metrics.jsonl" in ends["silent"]
    listed = {Path(each["folder"]).name: each for each in json.loads(said("list", tmp_path, "--json"))}
    assert listed["good"]["tokens_per_second"] == pytest.approx(128) and listed["good"]["steps"] == 6


def test_list_of_nothing_and_of_no_folder_are_sentences(tmp_path: Path, said: Any) -> None:
    assert said("list", tmp_path) == f"There are no runs in {tmp_path}.\n"
    assert "There is no folder" in said("list", tmp_path / "none", code=6)


def test_show_tells_what_the_run_was_and_how_it_went(tmp_path: Path, said: Any) -> None:
    events = whole()
    slow = [{"host": f"h{n}", "seconds": 1.0, "phases": {"forward": 1.0 + n}, "memory_bytes": 9 * n} for n in (0, 1)]
    folder = write(tmp_path / "a", *events, started(6))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "RanksReported", "time": 3e9, "step": 6, "steps": 6, "ranks": slow}) + "\n")
        seen = {"event": "AnomalySeen", "step": 3, "kind": "loss_spike", "what": "Loss 9 is 4 times", "policy": "skip"}
        file.write(json.dumps({**seen, "time": 3e9}) + "\n{torn")
    page = said("show", folder)
    for part in (
        "ended without a word, 6 of 6 steps",
        "1,234 parameters on 2 processes, plan zero=2 fp32",
        "after step 6: no word of its end",
        "model.args.width  4",
        "tokens/s        128",
        "rank 1 on h1 works 2.00 times as long",
        "loss_spike: 1 times, skip",
        "step 3: Loss 9 is 4 times",
        "backward",
        "1 line of metrics.jsonl",
    ):
        assert part in page, f"{part!r} is not in\n{page}"
    assert "train.seed" not in page, "a default is not worth a line"
    found = json.loads(said("show", folder, "--json"))
    assert found["figures"]["peak_memory_bytes"] == 5_000_000 and found["slow_ranks"][0]["rank"] == 1
    assert found["recipe"]["model"]["args"] == {"width": 4} and len(found["environments"]) == 1
    assert sum(found["time"].values()) == pytest.approx(found["figures"]["wall_seconds"])


def test_thousands_of_tracked_names_are_a_page_that_says_how_many_more_there_are(tmp_path: Path, said: Any) -> None:
    tracked = [Tracked(step=1, name=f"name {n}\x1b[2J", value=n) for n in range(3000)]
    page = said("show", write(tmp_path / "a", started(), step(1), *tracked))
    assert len(page.splitlines()) < 120 and "and 2,960 more, which --json has" in page and "\x1b" not in page


def test_show_csv_is_a_table_of_the_steps_that_stand(tmp_path: Path, said: Any) -> None:
    folder = write(tmp_path / "a", started(), step(1), step(2, 9.0), started(1), step(2, math.nan))
    rows = list(csv.DictReader(io.StringIO(said("show", folder, "--csv"))))
    assert [(row["step"], row["loss"]) for row in rows] == [("1", "2.0"), ("2", "nan")]
    assert "ask for one" in said("show", folder, "--csv", "--json", code=2)


@pytest.mark.parametrize("verb", [("show",), ("show", "--csv"), ("plot",), ("compare", ".")])
def test_what_is_no_run_is_a_sentence(tmp_path: Path, said: Any, verb: tuple[str, ...]) -> None:
    write(tmp_path / "real", started())
    assert "There is no folder" in said(verb[0], tmp_path / "reel", *verb[1:], code=6)
    message = said(verb[0], tmp_path, *verb[1:], code=6)
    assert "is no run" in message and str(tmp_path / "real") in message


def test_compare_shows_what_differs_of_runs_of_other_recipes(tmp_path: Path, said: Any) -> None:
    one, other = write(tmp_path / "one", *whole()), write(tmp_path / "other", *whole(3.0), seed=5)
    RunFolder(other).write_recipe("train: {steps: 6, seed: 5}\nmodel: {name: 'b:B'}\nfolder: y\n")
    entries = json.loads((other / "environment.json").read_text())
    (other / "environment.json").write_text(json.dumps([{**entries[0], "packages": {"torch": "9"}}]))
    page = said("compare", one, other)
    lines = [line.split() for line in page.splitlines()]
    for words in (
        ["train.seed", "0", "5"],
        ["model.name", "(none)", "b:B"],
        ["steps", "6", "6"],
        ["tokens/s", "128", "128"],
        ["6", "2.1667", "3.1667"],
    ):
        assert words in lines, f"{words} is not in\n{page}"
    assert any(line[:1] == ["packages.torch"] and line[-1] == "9" for line in lines)
    assert "folder" not in page.replace("folders", "")
    found = json.loads(said("compare", one, other, "--json"))
    assert found["settings"]["train.seed"] == [0, 5] and len(found["at_equal_steps"]) == 4
    assert "two runs or more" in said("compare", one, code=2)


def test_plot_draws_one_run_or_several(tmp_path: Path, said: Any) -> None:
    pytest.importorskip("matplotlib")
    one, other = write(tmp_path / "one", *whole()), write(tmp_path / "other", *whole(3.0))
    names = [f"{name}.png" for name in ("loss", "throughput", "memory", "time")]
    assert said("plot", one).split() == [str(one / "pictures" / name) for name in names]
    assert said("plot", one, other, "-o", tmp_path / "both").split() == [
        str(tmp_path / "both" / name) for name in names
    ]
    assert all((tmp_path / "both" / name).stat().st_size > 5000 for name in names)
    assert "1 more cannot be told apart" in said("plot", *[one] * 9, "-o", tmp_path / "many")


def test_plot_without_matplotlib_names_the_extra(tmp_path: Path, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = write(tmp_path / "a", *whole())
    assert 'pip install "trainfleet[monitor]"' in said("plot", folder, code=4)
    assert not (folder / "pictures").exists()
