"""Each benchmark runs, and its tables say what they must; the figures themselves are of no interest here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="benchmarks train")

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))


def tables(script: str, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, f"benchmarks/{script}.py", "--quick", "--results", str(folder), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    answer = json.loads((folder / f"{script}.json").read_text())
    assert {"date", "processor", "cores", "memory", "torch", "trainfleet"} <= answer["machine"].keys()
    assert all(table["title"] in (folder / f"{script}.md").read_text() for table in answer["tables"])
    return list(answer["tables"])


@pytest.mark.cluster
@pytest.mark.matrix
def test_every_loop_of_a_comparison_computes_the_same_losses(tmp_path: Path) -> None:
    (table,) = tables("step_overhead", tmp_path, "--no-rivals", "--only", "tiny/1")
    rows = {row[0]: row for row in table["rows"]}
    assert rows.keys() == {"by hand", "by hand, again", "trainfleet"}
    assert all(float(row[-1]) < 1e-5 for row in rows.values())


@pytest.mark.cluster
@pytest.mark.matrix
def test_every_stage_holds_what_the_formula_says(tmp_path: Path) -> None:
    (table,) = tables("zero_memory", tmp_path, "--no-rivals")
    assert "is within 3% of the formula" in table["notes"][0]
    assert {row[0] for row in table["rows"]} == {"0", "1", "2", "3"}


@pytest.mark.cluster
@pytest.mark.matrix
def test_positions_in_pieces_keep_less_for_backward_and_give_the_same_loss(tmp_path: Path) -> None:
    (table,) = tables("activation_memory", tmp_path)
    shares = {row[0]: float(row[2]) for row in table["rows"]}
    assert shares["tp=2 tp_sequence"] < 1
    assert shares["tp=2 recompute=blocks tp_sequence"] < 0.75 * shares["tp=2 recompute=blocks"]
    assert len({row[3] for row in table["rows"]}) == 1


@pytest.mark.cluster
@pytest.mark.matrix
def test_startup_tells_the_time_of_commands_and_of_first_steps(tmp_path: Path) -> None:
    commands, first_steps = tables("startup", tmp_path, "--no-rivals")
    assert [row[3] for row in commands["rows"] if row[0] == "trainfleet --help"] == ["under 0.4 s"]
    assert all(float(row[1]) > 0 for row in [*commands["rows"], *first_steps["rows"]])


@pytest.mark.cluster
@pytest.mark.matrix
def test_checkpoints_are_timed_beside_a_plain_write(tmp_path: Path) -> None:
    loop, past_caches, commit, back = tables("checkpoint_stall", tmp_path, "--no-rivals")
    for table in (loop, past_caches):
        assert [row[0] for row in table["rows"]] == ["a plain copy of the same bytes", "trainfleet"]
    assert {row[0] for row in commit["rows"]} == {"trainfleet", "plain write"}
    assert [row[0] for row in back["rows"]] == ["trainfleet"]


@pytest.mark.matrix
def test_the_data_loaders_are_compared_with_each_other(tmp_path: Path) -> None:
    (table,) = tables("data_loader", tmp_path)
    assert {row[2] for row in table["rows"]} == {"LocalBatches", "LocalBatches again", "DataLoader"}


@pytest.mark.matrix
def test_the_fused_loss_is_timed_beside_the_plain_one(tmp_path: Path) -> None:
    (table,) = tables("linear_cross_entropy", tmp_path)
    assert [row[1] for row in table["rows"]] == ["plain", "trainfleet"]
    assert all(float(row[-1]) > 0 for row in table["rows"])


@pytest.mark.cluster
@pytest.mark.matrix
def test_our_stages_are_compared_with_those_of_deepspeed(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is what it compares with")
    times, memory = tables("beside_deepspeed", tmp_path)
    assert [row[0] for row in times["rows"]] == [stage for stage in "123" for _ in range(4)]
    assert all(float(row[-1]) < 1e-4 for row in times["rows"])
    assert [row[1] for row in memory["rows"]] == ["DeepSpeed", "trainfleet"] * 3


@pytest.mark.cluster
@pytest.mark.matrix
def test_every_schedule_has_its_bubble_beside_the_formula(tmp_path: Path) -> None:
    (table,) = tables("pipeline_bubble", tmp_path)
    rows = {row[0]: row for row in table["rows"]}
    assert len(rows) == 7
    assert rows["1f1b"][1] == pytest.approx(1 / 5)  # p = 2, m = 4
    assert rows["looped_bfs"][1] == pytest.approx(1 / 9)
    assert all(0 < float(row[2].split()[0]) < 1 and row[3] > 0 for row in rows.values())


@pytest.mark.cluster
@pytest.mark.matrix
def test_plans_are_held_against_one_process(tmp_path: Path) -> None:
    (table,) = tables("parity", tmp_path)
    assert [row[0] for row in table["rows"]] == ["tp=2", "pp=2 1f1b"]
    assert "2 of 2 cells compute what one process computes" in table["notes"][0]


@pytest.mark.cluster
@pytest.mark.matrix
def test_bugs_are_found_at_the_tensor_that_they_change(tmp_path: Path) -> None:
    (table,) = tables("injected_bugs", tmp_path)
    assert table["notes"][0].startswith("2 of 2 bugs are found at the right tensor; 0 false alarms")


@pytest.mark.cluster
@pytest.mark.matrix
def test_families_hold_or_are_refused_with_their_reason(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="one of the families is of transformers")
    (table,) = tables("families", tmp_path)
    assert [row[0] for row in table["rows"]] == ["llama", "forces"]
    assert "6 cells compute what one process computes, 2 are refused, 0 do not hold." in table["notes"][0]


@pytest.mark.matrix
def test_ways_of_feeding_are_timed_beside_raw_sockets(tmp_path: Path) -> None:
    one, two = tables("feed_throughput", tmp_path, "--no-rivals")
    for table in (one, two):
        assert {"raw TCP", "trainfleet, TCP", "trainfleet, one host"} <= {row[0] for row in table["rows"]}
        assert all(float(row[1]) > 0 and float(row[5]) > 0 for row in table["rows"] if row[1] != "not installed")
        assert "trainfleet, one host:" in table["notes"][0]


def test_marks_say_which_bound_holds_for_one_host() -> None:
    import feed_throughput

    rates = {"raw TCP": [4.0], "trainfleet, one host": [8.0], "shared memory, one copy": [9.0]}
    assert feed_throughput.marks(rates, {}) == (
        "trainfleet, one host: 2.0 times raw TCP (at least 3: MISSED; by hand: 2.2 times)."
    )
    rates["shared memory, spinning"] = [16.0]
    assert "by hand without ever sleeping: 4.0 times" in feed_throughput.marks(rates, {})


def test_an_interpreter_without_tensorflow_is_said_to_be_so() -> None:
    import feed_throughput
    from faults.service import serve_with_kills

    with pytest.raises(SystemExit, match="needs an interpreter with tensorflow"):
        feed_throughput.TensorflowWay("/bin/false")
    with pytest.raises(SystemExit, match="needs an interpreter with tensorflow"):
        serve_with_kills("/bin/false", "DYNAMIC", workers=1, kills=1, seed=0)


STAND_IN = """
import json, os, sys, time
role, samples = sys.argv[2], 240
if role == "dispatcher":
    print(json.dumps({"target": "grpc://127.0.0.1:1", "version": "none"}), flush=True)
    time.sleep(60)
elif role == "worker":
    print("0", flush=True)
    time.sleep(60)
print("0", flush=True)
for _ in sys.stdin:
    for index in [*range(samples - 2), 0, 0]:
        print(index, flush=True)
        time.sleep(0.001)
    print("null", flush=True)
"""


def test_uses_of_samples_are_counted_while_workers_are_killed(tmp_path: Path) -> None:
    """By a stand-in whose consumer leaves the last two samples out and has the first thrice."""
    from faults.service import serve_with_kills

    script, python = tmp_path / "service.py", tmp_path / "python"
    script.write_text(STAND_IN)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S {script} "$@"\n')
    python.chmod(0o700)
    served = serve_with_kills(str(python), "DYNAMIC", workers=2, kills=2, seed=0)
    assert served.kills == 2 and served.epochs >= 1 and not served.hung
    assert (served.lost, served.doubled) == (2 * served.epochs, 2 * served.epochs)


@pytest.mark.matrix
def test_rivals_with_tls_and_memory_without_sleep_give_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow.flight", reason="one of the ways is Arrow Flight")
    names = ["Arrow Flight, TLS", "shared memory, spinning"]
    for table in tables("feed_throughput", tmp_path, "--only", *names):
        assert {row[0]: float(row[1]) > 0 for row in table["rows"]} == dict.fromkeys(names, True)


def test_a_rival_that_is_not_installed_keeps_its_row() -> None:
    import step_overhead

    same = {"by hand": [1.0, 2.0], "by hand, again": [1.0, 2.0], "trainfleet": [1.1, 2.2]}
    answer = {"seconds": same, "cpu_seconds": same, "losses": same, "missing": ["Fabric"], "title": "", "note": ""}
    rows = step_overhead.table_of(answer).rows
    assert list(rows[-1][:2]) == ["Fabric", "not installed"]
    assert rows[2][3] == pytest.approx(1.1)


def test_the_interval_of_a_median_holds_it_and_is_always_the_same() -> None:
    from measuring.rounds import interval

    values = [1.0, 1.1, 0.9, 1.05, 0.95, 3.0]
    low, high = interval(values)
    assert 0.9 <= low < 1.025 < high <= 3.0
    assert interval(values) == (low, high)


@pytest.mark.cluster
@pytest.mark.matrix
def test_the_feed_loses_nothing_where_a_socket_peer_does(tmp_path: Path) -> None:
    lost, soon = tables("feed_faults", tmp_path)
    rows = {row[0]: row[3:] for row in lost["rows"]}
    assert rows["trainfleet"] == ["0", "0", "yes"] and rows["DataLoader over a socket"][2] == "no"
    assert {row[1] for row in soon["rows"] if row[0] == "trainfleet"} >= {"feeder", "trainer", "relay", "half open"}


@pytest.mark.cluster
@pytest.mark.matrix
def test_a_fed_run_trains_the_same_and_its_waits_are_told(tmp_path: Path) -> None:
    (table,) = tables("feed_training", tmp_path)
    rows = {row[0]: row for row in table["rows"]}
    assert list(rows)[:3] == ["local", "local, again", "one host"] and len(rows) == 5
    assert "All weights are the same, to the bit." in table["notes"][0]
    assert rows["one host"][1] != "not possible here"


def test_what_a_fed_run_waited_for_is_told_only_where_it_waited() -> None:
    import argparse

    import feed_training

    def answers(speed: float, idle: float, weights: str) -> list[dict[str, Any]]:
        causes = {"source": 0.0, "transform": 0.1, "network": 0.9, "data": 0.0}
        return [{"samples_per_second": speed, "idle": idle, "causes": causes, "weights": weights}] * 3

    given = {
        "local": answers(100.0, 0.001, "a"),
        "one host": answers(98.0, 0.002, "a"),
        "two hosts, 1 Gbit/s": answers(90.0, 0.1, "a"),
    }
    options = argparse.Namespace(rounds=3, steps=5)
    table = feed_training.table_of(given, {"two hosts, 100 Mbit/s": "needs root"}, options)
    assert [row[5] for row in table.rows] == ["nothing", "nothing", "network 90%, transform 10%", "needs root"]
    assert "one host: 0.980 of local (at least 0.97: holds)" in table.notes[0]
    assert "1 Gbit/s: 0.900 of local (at least 0.97: MISSED)" in table.notes[0]
    given["one host"] = answers(98.0, 0.002, "b")
    assert "THE WEIGHTS DIFFER" in feed_training.table_of(given, {}, options).notes[0]


@pytest.mark.matrix
def test_predictions_take_what_was_estimated_and_streamed_ones_no_more_with_the_data(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="predictions are streamed by pyarrow")
    (table,) = tables("predict_memory", tmp_path)
    assert "The arrays are within 10% of the estimate" in table["notes"][0]
    rows = {row[0]: row for row in table["rows"]}
    kept, peak = (float(rows["the same, streamed to Parquet"][column]) for column in (5, 6))
    assert kept < 20 and peak < 200


@pytest.mark.matrix
def test_an_epoch_in_windows_fetches_shards_once_and_one_order_over_all_again_and_again(tmp_path: Path) -> None:
    (table,) = tables("shards", tmp_path)
    windows, over_all = table["rows"][:2]
    assert float(windows[2]) < 1.5 < 10 < float(over_all[2])
    assert {row[4] for row in table["rows"]} == {"yes"}


@pytest.mark.matrix
def test_a_run_is_read_back_beside_plain_json(tmp_path: Path) -> None:
    (table,) = tables("read_run", tmp_path)
    assert [row[0] for row in table["rows"]] == ["100"] * 3 + ["1,000"] * 3
    assert all(float(row[3]) > 0 for row in table["rows"])


@pytest.mark.matrix
def test_a_hunt_names_what_is_planted_and_nothing_where_nothing_is(tmp_path: Path) -> None:
    planted, costs, clean = tables("nan_hunt", tmp_path)
    assert planted["notes"][0].startswith("2 of 2 are named rightly") and all(
        "WRONG" not in row[2] for row in planted["rows"]
    )
    assert [row[0] for row in costs["rows"]] == ["the small net", "the recipe's GPT"]
    assert clean["rows"] == [["2", "0"]]
