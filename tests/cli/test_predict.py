"""`trainfleet predict` leaves a folder that any end of it leaves whole, and goes on with it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the model is torch's")
pytest.importorskip("pyarrow", reason="predictions are written by pyarrow")
from answered import run, write_trained  # noqa: E402
from feeding import read_job  # noqa: E402

from trainfleet.serve import load_predictions, predict, written  # noqa: E402
from trainfleet.serve.service import ModelService  # noqa: E402
from trainfleet.training.inference import batches_of, predictor_of  # noqa: E402


@pytest.fixture
def trained(tmp_path):
    return write_trained(tmp_path)


def expected(trained, **asked):
    recipe = read_job(trained[0])
    return predict(predictor_of(recipe, str(trained[1]), "cpu"), batches_of(recipe), **asked)


def assert_same(folder, wanted):
    found = load_predictions(folder)
    for name in ("indices", "classes", "confidences", "probabilities"):
        ours, theirs = getattr(found, name), getattr(wanted, name)
        assert (ours is None and theirs is None) or np.array_equal(ours, theirs), name


def test_predictions_are_written_once_and_only_of_what_was_asked(trained, tmp_path, capsys):
    command = ["predict", trained[0], "--weights", trained[1], "--to", tmp_path / "p"]
    asked = ["--top-k", 2, "--confidence", "0.3", "--probabilities"]
    assert run(*command, *asked) == 0
    wanted = expected(trained, top_k=2, confidence=0.3, probabilities=True)
    assert 0 < len(wanted) < 21 and capsys.readouterr().out.startswith(f"{len(wanted)} of 21 rows; ")
    assert_same(tmp_path / "p", wanted)
    assert run(*command, *asked) == 0
    assert "of which 21 were there" in capsys.readouterr().out
    assert run(*command) == 2
    assert "top_k 2 and not 1" in capsys.readouterr().err
    assert run(*command, "--fresh") == 0
    assert_same(tmp_path / "p", expected(trained))


def test_the_model_may_stand_elsewhere(trained, tmp_path):
    predictor = predictor_of(read_job(trained[0]), str(trained[1]), "cpu")
    with ModelService(predictor, address="127.0.0.1:0").open() as service:
        assert run("predict", trained[0], "--feed", str(service.address), "--to", tmp_path / "p") == 0
    assert_same(tmp_path / "p", expected(trained))


def test_what_was_asked_of_a_service_goes_on_here_and_the_reverse(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(written, "PART_ROWS", 4)
    recipe = read_job(trained[0], "batch.global_batch=2")
    predictor = predictor_of(recipe, str(trained[1]), "cpu")

    def stop(done, total):
        if done >= 8:
            raise KeyboardInterrupt

    with ModelService(predictor, address="127.0.0.1:0").open() as service:
        place = str(service.address)
        for first, then in ((place, predictor), (predictor, place)):
            folder = tmp_path / str(first is place)
            with pytest.raises(KeyboardInterrupt):
                predict(first, batches_of(recipe), to=folder, progress=stop)
            assert load_predictions(folder).rows == 8  # the service had more of them
            assert predict(then, batches_of(recipe), to=folder).computed == 13
            assert_same(folder, predict(predictor, batches_of(recipe)))


# As the command, but slow, and with parts of 4 rows.
SLOW = """
import sys, time
import trainfleet.serve.written as written
import trainfleet.serve.predictor as predictor
written.PART_ROWS = 4
answer = predictor.Predictor.answer
def slow(self, batch, terms):
    time.sleep(0.15)
    return answer(self, batch, terms)
predictor.Predictor.answer = slow
from trainfleet.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("end", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.matrix)])
def test_ended_in_the_midst_the_same_command_goes_on(trained, tmp_path, capsys, end):
    command = [
        "predict",
        str(trained[0]),
        "--weights",
        str(trained[1]),
        "--to",
        str(tmp_path / "p"),
        "batch.global_batch=2",
    ]
    process = subprocess.Popen([sys.executable, "-c", SLOW, *command], stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "p").glob("part-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(end)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == (130 if end == signal.SIGINT else -signal.SIGKILL)
    if end == signal.SIGINT:
        assert f"What was predicted is in {tmp_path / 'p'}, and the same command goes on." in said
        assert "Traceback" not in said
    there = load_predictions(tmp_path / "p").rows
    assert 8 <= there < 21
    assert run(*command) == 0
    assert f"of which {there} were there" in capsys.readouterr().out
    recipe = read_job(trained[0], "batch.global_batch=2")
    assert_same(tmp_path / "p", predict(predictor_of(recipe, str(trained[1]), "cpu"), batches_of(recipe)))
