"""Every example runs as the README says, and its programs are short enough to stand there."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from free_ports import free_port

pytest.importorskip("torch", reason="the examples train with torch")
pytest.importorskip("sklearn", reason="the examples train on scikit-learn's digits")

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
BIN = Path(sys.executable).parent


def run(command: list[str], folder: Path, seconds: int = 200) -> str:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(EXAMPLES),
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(name: str) -> list[str]:
    return [sys.executable, str(EXAMPLES / name)]


def torchrun(name: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(EXAMPLES / name)]


def fed(name: str, folder: Path) -> str:
    """What the side that trains said, while the other side made its batches."""
    place = f"127.0.0.1:{free_port()}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES)}
    feeder = subprocess.Popen([*python(f"{name}_cpu.py"), place], cwd=folder, env=environment)
    try:
        said = run([*python(f"{name}_gpu.py"), place], folder)
        feeder.send_signal(signal.SIGINT)
        assert feeder.wait(30) == 0
    finally:
        feeder.kill()
    return said


def test_quick_start_finishes(tmp_path: Path) -> None:
    assert "reason='finished'" in run(python("quick_start.py"), tmp_path)


def test_one_call_learns(tmp_path: Path) -> None:
    held_out = float(run(python("one_call.py"), tmp_path).split()[-1])
    assert held_out < 0.6


def test_own_loop_runs_under_torchrun(tmp_path: Path) -> None:
    loss = float(re.search(r"loss ([\d.]+) after 100 steps on 2 processes", run(torchrun("own_loop.py"), tmp_path))[1])  # type: ignore[index]
    assert loss < 1.5


@pytest.mark.matrix
def test_zero_shows_what_a_process_holds(tmp_path: Path) -> None:
    lines = run(python("zero.py"), tmp_path).splitlines()
    held = [ast.literal_eval(line.split(" ", 1)[1]) for line in lines if line.startswith("zero=")]
    assert len(held) == 4
    assert held[0]["optimizer state"] > 1.9 * held[1]["optimizer state"]


def test_own_metric_is_that_of_training_and_of_evaluation(tmp_path: Path) -> None:
    said = run(python("own_metric.py"), tmp_path)
    assert re.search(r"track +100/100 +accuracy 0\.[89]", said)
    assert re.search(r"eval +100/100 +validation 0\.\d+ +accuracy 0\.9", said)


def test_own_callback_tells_its_own_metric(tmp_path: Path) -> None:
    assert re.search(r"track +100/100 +images 3200", run(python("own_callback.py"), tmp_path))


@pytest.mark.matrix
def test_a_killed_run_ends_as_one_that_was_never_killed(tmp_path: Path) -> None:
    said = run(python("resume.py"), tmp_path)
    assert said.count("by SIGKILL") == 2 and "60 losses, equal to the bit: True" in said


def test_a_loop_without_torch_goes_on_and_keeps_its_farthest(tmp_path: Path) -> None:
    lines = run(python("own_state.py"), tmp_path).splitlines()
    assert lines[0] == "begins at step 0" and lines[2] == "begins at step 50"
    assert lines[1].endswith("40, 50]") and lines[3].endswith("90, 100]")


def test_own_kernel_agrees_with_its_twin_and_trains(tmp_path: Path) -> None:
    said = run(python("own_kernel.py"), tmp_path)
    assert "6 tensors agree with the twin" in said and "reason='finished'" in said


@pytest.mark.matrix
def test_plans_are_proven_in_a_test_suite(tmp_path: Path) -> None:
    assert run(python("prove.py"), tmp_path).count("The plan computes what one process computes") == 2


def test_sharded_weights_are_exported_for_the_plain_module(tmp_path: Path) -> None:
    said = run(python("export.py"), tmp_path)
    right = re.search(r"(\d+)% of the held-out digits", said)
    assert right is not None and int(right[1]) > 80


def test_images_that_are_decoded_on_one_host_train_on_another(tmp_path: Path) -> None:
    pytest.importorskip("PIL", reason="images are decoded by Pillow, of the extra `data`")
    said = fed("images", tmp_path)
    held_out = re.search(r"evaluation=([\d.]+)", said)
    assert held_out is not None and float(held_out[1]) < 0.4
    assert len(re.findall("^eval ", said, re.MULTILINE)) >= 4, "after each of the epochs of 44 steps"
    assert re.search(r"\| +time +\d+% \w+", said) and re.search(r"\| +limit +\w+", said)


def test_batches_of_one_host_train_on_another(tmp_path: Path) -> None:
    said = fed("feed", tmp_path)
    held_out = re.search(r"evaluation=([\d.]+)", said)
    assert "reason='finished'" in said and held_out is not None and float(held_out[1]) < 0.6


@pytest.mark.matrix
def test_a_model_is_validated_and_asked_from_another_host(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="predictions are written by pyarrow")
    place = f"127.0.0.1:{free_port()}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES)}
    programs = [
        subprocess.Popen(
            [*python(f"{name}.py"), place], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
        )
        for name in ("serve_gpu", "validate_cpu", "predict_cpu")
    ]
    try:
        validated, predicted = (program.communicate(timeout=60)[0] for program in programs[1:])
        programs[0].send_signal(signal.SIGINT)
        assert programs[0].wait(30) == 0
    finally:
        for program in programs:
            program.kill()
            program.communicate()
    right = re.search(r"accuracy ([\d.]+)", validated)
    assert right is not None and float(right[1]) > 0.8 and (tmp_path / "runs" / "confusion.png").exists()
    assert " of 360 rows; " in predicted
    assert len(re.findall(r"image \d+: \d \(\d+%\), or \d \(\d+%\)", predicted)) == 5


@pytest.mark.matrix
def test_several_hosts_meet_and_train(tmp_path: Path) -> None:
    meeting = f"127.0.0.1:{free_port()}"
    short = ["train.steps=2", "train.evaluate_every=null", "train.evaluate_batches=1", "train.finish=null"]
    command = ["bash", str(EXAMPLES / "several_hosts.sh")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    second = subprocess.Popen(
        [*command, "1", meeting, *short, f"folder={tmp_path / 'run'}"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        first = run([*command, "0", meeting, *short, f"folder={tmp_path / 'run'}"], tmp_path)
        other, _ = second.communicate(timeout=60)
        assert second.returncode == 0, other
    finally:
        second.kill()
    told = first + other  # which of two hosts with one address is the first rank's is not ours to say
    assert "processes 2" in told
    assert told.count("finished") == 1


@pytest.mark.parametrize("program", ["quick_start.py", "one_call.py"])
def test_the_readmes_programs_are_at_most_twelve_lines(program: str) -> None:
    text = (EXAMPLES / program).read_text()
    body = text.split('"""', 2)[2]
    statements = [line for line in body.splitlines() if line.strip() and not line.startswith(("import ", "from "))]
    assert len(statements) <= 12
