from __future__ import annotations

import dataclasses
import json

import pytest
import yaml
from planted_run import BEGAN, HEALTHY, RECIPE, STEP_SECONDS, ended, healthy_events, started, step, write_run

from trainfleet.doctor.run import summary
from trainfleet.doctor.run.summary import summarize
from trainfleet.errors import ConfigError
from trainfleet.events import Restored
from trainfleet.store import FileStore

LATER = BEGAN + 1e6


def test_a_whole_run_is_read(tmp_path):
    run = summarize(write_run(tmp_path / "run", [started(), *healthy_events(saved=True), ended()]), now=LATER)
    assert (run.last_step, run.planned, run.world_size, run.starts, run.is_alive) == (400, 400, 2, 1, False)
    assert run.setting("checkpoint.every") == 100 and run.setting("plan.tp", 1) == 1
    assert run.batch() == (4, 2)
    assert run.whole_seconds == pytest.approx(399 * sum(HEALTHY.values())), "without the first step"
    assert run.share("backward") == pytest.approx(HEALTHY["backward"] / sum(HEALTHY.values()))
    assert len(run.evaluations) == len(run.saves) == 4 and len(run.reports) == 40
    assert run.capacity_bytes == 16_000_000_000, "two ranks on two hosts"


def test_steps_that_a_restart_or_a_rollback_undid_are_set_apart(tmp_path):
    first = [started(), *(step(number) for number in range(1, 31))]
    second = [started(start_step=20), *(step(number) for number in range(21, 41)), Restored(step=35, path="memory")]
    run = summarize(write_run(tmp_path / "run", [*first, *second, *(step(n) for n in range(36, 51)), ended(50)]))
    assert [row["step"] for row in run.steps] == list(range(1, 51))
    assert sorted(row["step"] for row in run.undone) == [*range(21, 31), *range(36, 41)]
    assert run.starts == 2 and 21 not in [row["step"] for row in run.warm]


def test_a_run_without_phases_has_those_that_it_knew(tmp_path):
    old = [
        dataclasses.replace(event, phases={}) if hasattr(event, "phases") else event
        for event in healthy_events(lambda number: {"data_seconds": 0.1, "waits": {"source": 0.1}}, saved=True)
    ]
    run = summarize(write_run(tmp_path / "run", [started(), *old, ended()]))
    assert set(run.phases) == {"data", "computing", "evaluation", "checkpoint"}
    assert run.phases["data"] == pytest.approx(39.9) and run.phases["evaluation"] == pytest.approx(2.0)


def test_torn_files_and_lines_of_other_versions_give_what_they_have(tmp_path):
    folder = write_run(tmp_path / "run", [started(), *healthy_events()], torn=True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('\n{"event": "StepEnded", "step": 401}\n{"event": "Unheard"}\n[]\nnoise')
    (folder / "environment.json").write_text("[{")
    (folder / "recipe.yaml").write_text("plan: [")
    run = summarize(folder, now=LATER)
    assert run.last_step == 400 and run.ended is None and run.capacity_bytes is None
    (folder / "metrics.jsonl").write_text("")
    assert summarize(folder).steps == []


def test_the_recipe_beside_it_counts_where_no_event_has_it(tmp_path):
    folder = write_run(tmp_path / "run", [dataclasses.replace(started(), recipe={}), step(1)])
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    assert summarize(folder).setting("train.steps") == 400


def test_a_run_is_alive_while_somebody_holds_its_folder_or_it_has_just_spoken(tmp_path):
    folder = write_run(tmp_path / "run", [started(), step(1)])
    assert not summarize(folder, now=LATER).is_alive
    assert summarize(folder, now=BEGAN + STEP_SECONDS + 5).is_alive
    hold = FileStore(folder).hold()
    assert summarize(folder, now=LATER).is_alive
    hold.close()
    assert not summarize(folder, now=LATER).is_alive


def test_asking_whether_it_is_held_takes_no_hold(tmp_path):
    folder = write_run(tmp_path / "run", [started(), step(1)])
    FileStore(folder).hold().close()
    summarize(folder)
    FileStore(folder).hold().close()


def test_what_is_no_run_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match="is no folder of a run"):
            summarize(folder)


def test_the_memory_of_a_host_is_shared_by_its_ranks(tmp_path):
    folder = write_run(tmp_path / "run", [started(), step(1)])
    assert summarize(folder).capacity_bytes == 8_000_000_000
    (folder / "environment.json").write_text(json.dumps([{"device": "cuda:0", "memory_bytes": 1, "world_size": 2}]))
    assert summarize(folder).capacity_bytes is None, "a GPU's is not the host's"


def test_of_a_long_run_some_steps_are_looked_at_and_every_one_that_is_not_finite(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "MOST_STEPS", 100)
    events = healthy_events(lambda number: {"loss": float("nan")} if number == 123 else {}, steps=1000)
    run = summarize(write_run(tmp_path / "run", [started(steps=1000), *events, ended(1000)]))
    assert run.one_of == 10 and 70 <= len(run.steps) <= 130
    assert run.last_step == 1000 and 123 in [row["step"] for row in run.steps]
    assert run.share("backward") == pytest.approx(HEALTHY["backward"] / sum(HEALTHY.values()))
