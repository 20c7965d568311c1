"""`trainfleet gpu-service` says what answers and how to ask, and ends without leaving anything behind."""

from __future__ import annotations

import re
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="models are torch's")

from feeding import FeederProcess, read_job, write_job  # noqa: E402
from serve.made import VALIDATE, Weighted, all_same, batches  # noqa: E402

from trainfleet.cli.gpu_service import how_it_goes  # noqa: E402
from trainfleet.cli.main import main  # noqa: E402
from trainfleet.errors import DataError, NotAdmitted  # noqa: E402
from trainfleet.imports import load_object  # noqa: E402
from trainfleet.net.listener import Listener  # noqa: E402
from trainfleet.net.token import Token  # noqa: E402
from trainfleet.serve import ModelService, RemoteModel  # noqa: E402
from trainfleet.training.inference import batches_of, predictor_of  # noqa: E402

SOON = timedelta(seconds=20)
FREE = "127.0.0.1:0"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A recipe, and weights that are not those of its first step."""
    path = write_job(tmp_path)
    recipe = read_job(path)
    assert recipe.model.name is not None
    torch.manual_seed(5)
    torch.save(load_object(recipe.model.name, key="model.name")().state_dict(), weights(path))
    return path


def weights(path: Path) -> str:
    return str(path.parent / "weights.pt")


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


def serving(path: Path, *arguments: str) -> FeederProcess:
    return FeederProcess(path, "--weights", weights(path), "--device", "cpu", *arguments, verb="gpu-service")


def test_a_recipes_model_answers_until_a_signal(path: Path) -> None:
    recipe = read_job(path)
    here = predictor_of(recipe, weights(path), "cpu")
    with serving(path, "--listen", FREE) as service:
        with RemoteModel(service.reached_by, timeout=SOON) as model:
            assert model.digest == here.digest
            answers = model.answers(batches_of(recipe), VALIDATE)
            assert all_same(answers, here.answers(batches_of(recipe), VALIDATE))
            service.find(r"(Client \S+ is here)")
        service.find(r"(Client \S+ is done: 3 batches)")
        assert service.stop(signal.SIGINT) == 0, service.said
    assert "model       Sequential, 148 parameters\n" in service.said and "device      cpu\n" in service.said
    assert f"weights     {here.digest}\n" in service.said and "only this host can connect" in service.said
    assert f"  trainfleet validate {path} --feed 127.0.0.1:" in service.said
    assert re.search(rf"  trainfleet predict {re.escape(str(path))} --feed 127\S+ --to predictions\n", service.said)
    assert service.said.splitlines()[-1] == "Ended after 3 batches, 21 rows." and "Traceback" not in service.said


@pytest.mark.matrix
def test_off_loopback_the_token_that_is_printed_lets_clients_in(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="TLS off loopback needs the extra `net`")
    recipe = read_job(path)
    options = ["--address", "127.0.0.1", "--folder", str(tmp_path / "kept")]
    with serving(path, "--listen", "0.0.0.0:0", *options) as service:
        token = service.reached_by
        with RemoteModel(token, timeout=SOON) as model:
            here = predictor_of(recipe, weights(path), "cpu")
            assert all_same(model.answers(batches_of(recipe), VALIDATE), here.answers(batches_of(recipe), VALIDATE))
        wrong = Token.make(Token.parse(token).addresses, fingerprint=bytes(32))
        with RemoteModel(str(wrong), timeout=SOON) as model, pytest.raises(NotAdmitted):
            model.digest  # noqa: B018
        assert service.stop() == 0


def test_what_is_in_the_way_is_a_sentence(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("gpu-service", str(path), "--listen", FREE) == 7
    assert "There are no weights in" in capsys.readouterr().err
    with Listener(FREE, role="gpu-service") as taken:
        listen = ["--listen", str(taken.address)]
        assert run("gpu-service", str(path), "--weights", weights(path), "--device", "cpu", *listen) == 2
        assert f"Port {taken.address.port} of this host is in use" in capsys.readouterr().err
    assert run("gpu-service", str(path), "--tunnel", "carrier-pigeon") == 2
    assert run("gpu-service", str(path), "--weights", weights(path), "--device", "cpu", "--class", "nowhere:Pair") == 2


def test_its_live_line_says_how_it_goes() -> None:
    with ModelService(Weighted(seconds=0.01), address=FREE).open() as service:
        text = how_it_goes(service)
        with RemoteModel(str(service.address)) as model:
            assert len(list(model.answers(batches(5), VALIDATE))) == 5
            wait_for_batches(service, 5)
            rates = r"10\.0 batches/s  80 rows/s  [\d.]+ kB/s  model \d+% busy"
            assert re.match(rf"{rates}  1 client  0 waiting  5 batches$", text(0.5))
            with pytest.raises(DataError, match="KeyError"):
                list(model.answers([{"y": torch.zeros(2)}], VALIDATE))
            wait_for_batches(service, 6)
        assert text(0.5).endswith("6 batches  1 failed")


def wait_for_batches(service: ModelService, count: int) -> None:
    """An answer is counted when it has been sent, and may be here before that."""
    ends = time.monotonic() + 5
    while service.served.batches < count:
        assert time.monotonic() < ends
        time.sleep(0.005)
