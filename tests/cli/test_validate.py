"""`trainfleet validate` says the numbers of the library, whether the model is here or stands elsewhere."""

from __future__ import annotations

import json
import socket
import threading

import pytest

torch = pytest.importorskip("torch", reason="the model is torch's")
from answered import run, write_trained  # noqa: E402
from feeding import read_job  # noqa: E402

from trainfleet.serve import validate  # noqa: E402
from trainfleet.serve.service import ModelService  # noqa: E402
from trainfleet.training import inference  # noqa: E402
from trainfleet.training.inference import batches_of, predictor_of  # noqa: E402


@pytest.fixture
def trained(tmp_path):
    return write_trained(tmp_path)


def expected(trained, stream="evaluation"):
    recipe = read_job(trained[0])
    return validate(predictor_of(recipe, str(trained[1]), "cpu"), batches_of(recipe, stream))


@pytest.mark.parametrize("stream", ["evaluation", "training"])
def test_the_numbers_are_printed_written_and_drawn(trained, tmp_path, capsys, stream):
    places = ["--json", tmp_path / "all.json", "--picture", tmp_path / "new" / "matrix.png"]
    assert run("validate", trained[0], "--weights", trained[1], "--stream", stream, *places) == 0
    wanted = expected(trained, stream)
    said = capsys.readouterr().out
    assert said.startswith(str(wanted)) and f"of {90 if stream == 'training' else 21}\n" in said
    assert json.loads((tmp_path / "all.json").read_text()) == wanted.to_plain()
    assert (tmp_path / "new" / "matrix.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("way", ["calls", "listens"])
def test_the_model_may_stand_elsewhere_and_none_is_built_here(trained, tmp_path, capsys, monkeypatch, way):
    wanted, predictor = expected(trained), predictor_of(read_job(trained[0]), str(trained[1]), "cpu")
    monkeypatch.setattr(inference, "build_model", None)
    command = ["validate", trained[0], "--json", tmp_path / "all.json"]
    if way == "calls":
        with ModelService(predictor, address="127.0.0.1:0").open() as service:
            assert run(*command, "--feed", str(service.address)) == 0
    else:
        with socket.create_server(("127.0.0.1", 0)) as free:
            place = f"127.0.0.1:{free.getsockname()[1]}"
        service = ModelService(predictor, address=None, dials=[place])
        opening = threading.Timer(0.1, service.open)
        opening.start()
        assert run(*command, "--listen", place) == 0
        opening.join()
        service.close()
        assert f"trainfleet gpu-service {trained[0]} --dial {place}" in capsys.readouterr().err
    assert json.loads((tmp_path / "all.json").read_text()) == wanted.to_plain()


def test_a_run_without_checkpoints_is_a_sentence(trained, capsys):
    assert run("validate", trained[0]) == 7
    assert "There are no weights in" in capsys.readouterr().err


def test_values_have_no_picture(tmp_path, capsys):
    path, weights = write_trained(tmp_path)
    options = ["loss=mse", "data.collate=asked_collate:floats", "data.transform=null"]
    (tmp_path / "asked_collate.py").write_text(
        "import numpy as np\n"
        "def floats(samples):\n"
        "    x = np.stack([s['input'] for s in samples])\n"
        "    return {'input': x, 'target': x}\n"
    )
    assert run("validate", path, "--weights", weights, *options) == 0
    assert "R2" in capsys.readouterr().out
    assert run("validate", path, "--weights", weights, *options, "--picture", tmp_path / "a.png") == 2
    assert "values have no confusion matrix" in capsys.readouterr().err
