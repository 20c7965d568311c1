"""Predictions in a folder: after a kill at any moment the same call goes on, and no row is lost, doubled or other."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from serving_numpy import Scorer, numpy_stream

pytest.importorskip("pyarrow", reason="predictions are written by pyarrow")
from pyarrow import dataset

from trainfleet.errors import ConfigError, DataError, DependencyError, StoreError
from trainfleet.serve import written
from trainfleet.serve.about import ABOUT
from trainfleet.serve.columns import Columns
from trainfleet.serve.predictions import predict
from trainfleet.serve.written import load_predictions
from trainfleet.store.direct import DirectFile
from trainfleet.store.file import FileStore


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(written, "PART_ROWS", 20)


def run(folder: Path, **settings):
    settings = {"top_k": 2, "confidence": 0.3, "probabilities": True, "batches": numpy_stream()} | settings
    return predict(settings.pop("model", None) or Scorer(), settings.pop("batches"), to=folder, **settings)


def table(folder: Path):
    """As any program reads it."""
    return dataset.dataset(folder, format="parquet").to_table()


def expected(**settings):
    return predict(Scorer(), numpy_stream(), **{"top_k": 2, "confidence": 0.3, "probabilities": True} | settings)


def assert_whole(folder: Path, reference: Path | None = None) -> None:
    found, wanted = load_predictions(folder), expected()
    for name in ("indices", "classes", "confidences", "probabilities"):
        ours, theirs = getattr(found, name), getattr(wanted, name)
        assert ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes(), name
    assert found.rows == 103
    if reference is not None:
        assert table(folder).equals(table(reference))


def test_a_folder_holds_what_memory_would(tmp_path):
    done = run(tmp_path / "new" / "predictions")
    assert (done.rows, done.kept, done.computed) == (103, len(expected()), 103) and len(
        list(done.folder.glob("part-*"))
    ) > 2
    assert_whole(done.folder)
    told = table(done.folder)
    assert told.column_names == ["index", "classes", "confidences", "probabilities"]
    assert told["index"].to_pylist() == expected().indices.tolist()
    assert told["classes"].to_pylist() == expected().classes.tolist()


def test_one_class_a_row_is_a_plain_column(tmp_path):
    run(tmp_path, top_k=1, probabilities=False, confidence=0.0, classes="abcde")
    told = table(tmp_path)
    assert [str(kind) for kind in told.schema.types] == ["int64", "int32", "float"] and len(told) == 103
    assert told["class"].to_pylist() == expected(confidence=0.0).classes[:, 0].tolist()
    assert load_predictions(tmp_path).names == tuple("abcde") and load_predictions(tmp_path).classes.shape == (103, 1)


@pytest.mark.parametrize("width", [(), (1,), (3,), (2, 2)])
def test_values_come_back(tmp_path, width):
    run(tmp_path, model=Scorer(values=width), top_k=1, confidence=0.0, probabilities=False)
    found = load_predictions(tmp_path).values
    wanted = predict(Scorer(values=width), numpy_stream()).values
    assert found.reshape(wanted.shape).tobytes() == wanted.tobytes()


def test_a_filter_that_keeps_nothing_leaves_a_table_without_rows(tmp_path):
    done = run(tmp_path, confidence=1.0)
    assert done.kept == 0 and done.rows == 103 and len(table(tmp_path)) == 0
    assert len(load_predictions(tmp_path)) == 0
    assert run(tmp_path, confidence=1.0).computed == 0


def test_what_is_done_is_not_computed_again(tmp_path):
    run(tmp_path)
    model = Scorer()
    assert run(tmp_path, model=model).computed == 0 and model.answered == 0


def kill_at(moment: int, folder: Path, batches: str = "stream") -> bool:
    """Predict in a child that is killed at its `moment`-th step of work; whether it ended before."""
    pid = os.fork()
    if pid == 0:
        try:
            left = [moment]

            def tick():
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            def counted(owner, name):
                original = getattr(owner, name)

                def step(*given, **named):
                    tick()
                    result = original(*given, **named)
                    tick()
                    return result

                setattr(owner, name, step)

            for owner, name in (
                (DirectFile, "write"), (DirectFile, "finish"), (Path, "replace"), (Path, "mkdir"), (FileStore, "put"),
                (Columns, "add"), (Columns, "take"), (Path, "unlink"),
            ):  # fmt: skip
                counted(owner, name)
            run(folder, batches=numpy_stream() if batches == "stream" else list(numpy_stream(epochs=1)))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed otherwise"
    return not os.WIFSIGNALED(status)


@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.matrix)])
def test_killed_at_every_moment_the_same_call_goes_on(tmp_path, stride):
    run(tmp_path / "undisturbed")
    moment, saved = 0, []
    while not kill_at(moment, tmp_path / str(moment)):
        done = run(tmp_path / str(moment))
        assert done.rows == 103 and done.kept == len(expected())
        assert_whole(tmp_path / str(moment), tmp_path / "undisturbed")
        saved.append(103 - done.computed)
        moment += stride
    assert moment > 80 and saved == sorted(saved) and len(set(saved)) > 3, "nothing was kept, or it was not used"


def test_killed_again_and_again_it_comes_to_the_end(tmp_path):
    run(tmp_path / "undisturbed")
    for batches in ("stream", "list"):
        moments = np.random.default_rng(0).integers(0, 35, 200).tolist()
        kills = next(n for n, moment in enumerate(moments) if kill_at(moment, tmp_path / batches, batches))
        assert 3 < kills < 199
        # What is only iterated has no digest of its first row, and so another description.
        assert_whole(tmp_path / batches)
        assert batches == "list" or table(tmp_path / batches).equals(table(tmp_path / "undisturbed"))


def test_going_on_reads_no_sample_before_the_place_but_the_first(tmp_path):
    for moment in range(1000):
        kill_at(moment, tmp_path)
        if len(list(tmp_path.glob("part-*"))) == 2:
            break
    begin = load_predictions(tmp_path).rows
    batches = numpy_stream()
    read = batches.maker.source.read = []
    run(tmp_path, batches=batches)
    assert 0 < begin < 103 and sorted(set(read)) == [*range(8), *range(begin, 103)]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError])
def test_what_ends_it_finds_the_rows_so_far_committed(tmp_path, kind):
    def end(done, total):
        if done >= 16:
            raise kind

    with pytest.raises(kind):
        run(tmp_path, progress=end)
    assert load_predictions(tmp_path).rows == 16
    assert run(tmp_path).computed == 87
    assert_whole(tmp_path)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"model": Scorer(digest="2")}, "other weights"),
        ({"top_k": 3}, "top_k 2 and not 3"),
        ({"confidence": 0.5}, "confidence 0.3 and not 0.5"),
        ({"batches": numpy_stream(count=104)}, "103 samples and not 104"),
        ({"batches": numpy_stream(seed=4)}, "other data"),
    ],
)
def test_other_weights_terms_or_data_are_refused_or_begin_anew(tmp_path, other, said):
    run(tmp_path)
    with pytest.raises(ConfigError, match=said) as refused:
        run(tmp_path, **other)
    assert "--fresh" in refused.value.hint
    assert_whole(tmp_path)
    run(tmp_path, **other, fresh=True)
    with pytest.raises(ConfigError, match="The predictions in"):
        run(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "rows"])
def test_a_damaged_part_is_named(tmp_path, damage):
    run(tmp_path)
    path = tmp_path / "part-000001.parquet"
    whole = bytearray(path.read_bytes())
    if damage == "rows":
        path.write_bytes((tmp_path / "part-000000.parquet").read_bytes())
    else:
        whole[len(whole) // 4] ^= 4
        path.write_bytes({"cut": whole[:-20], "flip": whole, "empty": b""}[damage])
    for call in (lambda: run(tmp_path), lambda: load_predictions(tmp_path)):
        with pytest.raises(DataError, match=r"part-000001[.]parquet cannot be used"):
            call()
    for later in sorted(tmp_path.glob("part-*"))[1:]:
        later.unlink()
    assert 0 < run(tmp_path).computed < 103
    assert_whole(tmp_path)


def test_every_flipped_bit_of_a_part_is_noticed_or_harmless(tmp_path):
    run(tmp_path)
    path = tmp_path / "part-000000.parquet"
    whole = path.read_bytes()
    noticed, draw = 0, np.random.default_rng(0)
    for bit in draw.integers(0, 8 * len(whole), 150):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(flipped)
        try:
            found = load_predictions(tmp_path)
        except DataError as error:
            assert "part-00000" in str(error)
            noticed += 1
        else:
            assert found.indices.tobytes() == expected().indices.tobytes()
            assert found.probabilities.tobytes() == expected().probabilities.tobytes()
    assert noticed > 75


def test_a_missing_part_is_named(tmp_path):
    run(tmp_path)
    (tmp_path / "part-000001.parquet").unlink()
    with pytest.raises(DataError, match=r"part-000001[.]parquet was expected"):
        run(tmp_path)


def test_parts_that_nobody_describes_are_left_alone(tmp_path):
    run(tmp_path)
    (tmp_path / ABOUT).unlink()
    with pytest.raises(ConfigError, match="says what it is of"):
        run(tmp_path)
    with pytest.raises(ConfigError, match="no predictions in"):
        load_predictions(tmp_path)
    run(tmp_path / "other", confidence=0.5)
    (tmp_path / "other" / ABOUT).replace(tmp_path / ABOUT)
    with pytest.raises(ConfigError, match="of other weights, terms or data than"):
        run(tmp_path, confidence=0.5)


def test_a_full_disk_is_a_sentence_and_what_is_there_stands(tmp_path, monkeypatch):
    original = DirectFile.finish

    def full(self):
        if len(list(tmp_path.glob("part-*"))) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(self)

    monkeypatch.setattr(DirectFile, "finish", full)
    with pytest.raises(StoreError, match="the disk is full"):
        run(tmp_path)
    assert len(table(tmp_path)) == len(load_predictions(tmp_path)) > 0 and not list(tmp_path.glob(".unfinished*"))
    monkeypatch.undo()
    monkeypatch.setattr(written, "PART_ROWS", 20)
    assert 0 < run(tmp_path).computed < 103
    assert_whole(tmp_path)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_what_ends_it_in_a_commit_doubles_and_empties_nothing(tmp_path, monkeypatch, moment):
    original, ended = Path.replace, []

    def interrupted(self, target):
        is_third = Path(target).name == "part-000002.parquet" and not ended
        if is_third:
            ended.append(target)
            if moment == "before":
                raise KeyboardInterrupt
        original(self, target)
        if is_third:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert ended and len(list(tmp_path.glob("part-*"))) == (2 if moment == "before" else 3)
    assert 0 < run(tmp_path).computed < 103
    assert_whole(tmp_path)


def test_a_folder_is_one_process_s_at_a_time(tmp_path, monkeypatch):
    hold, original = FileStore(tmp_path).hold(), FileStore.hold
    monkeypatch.setattr(FileStore, "hold", lambda self: original(self, timedelta(seconds=0.1)))
    with pytest.raises(StoreError, match="in use by"):
        run(tmp_path)
    hold.close()


def test_parts_are_bounded_by_bytes_and_by_time_too(tmp_path, monkeypatch):
    monkeypatch.setattr(written, "PART_ROWS", 1 << 20)
    monkeypatch.setattr(written, "PART_BYTES", 1000)
    assert len(list(run(tmp_path / "bytes").folder.glob("part-*"))) > 2
    monkeypatch.setattr(written, "PART_BYTES", 1 << 30)
    assert len(list(run(tmp_path / "one").folder.glob("part-*"))) == 1
    monkeypatch.setattr(written, "PART_SECONDS", -1.0)
    assert len(list(run(tmp_path / "time").folder.glob("part-*"))) == 13


def test_without_pyarrow_it_is_said_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    model = Scorer()
    with pytest.raises(DependencyError, match="Writing predictions to Parquet"):
        run(tmp_path, model=model)
    assert model.answered == 0
