"""What a save function writes is committed, verified and removed together with its checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
from held import Held

from trainfleet.checkpoint import Checkpointer, Retention
from trainfleet.comm.threads import run_ranks
from trainfleet.errors import CheckpointError, ConfigError
from trainfleet.state import ShardedArray
from trainfleet.store import FileStore, MemoryStore


def as_text(state, step, path):
    path.with_suffix(".txt").write_text(f"{step} {state['m']['w'].tolist()}")


def as_folder(state, step, path):
    (path / "deep").mkdir(parents=True)
    np.save(path / "deep" / "w.npy", state["m"]["w"])
    (path / "step").write_text(str(step))
    (path / "deep-w").write_text("another file")


def failing(state, step, path):
    raise ValueError("no such format")


def nothing(state, step, path):
    pass


def further(folder):
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name.partition("-with-")[2] for name in names if "-with-" in name)


def test_it_gets_whole_arrays_from_any_number_of_ranks():
    store = MemoryStore()

    def save(group):
        piece = ShardedArray(name="w", global_shape=(4,), offsets=(2 * group.rank,), local=np.full(2, group.rank))
        with Checkpointer(store, group=group, save_function=as_text) as checkpointer:
            checkpointer.save(5, m=Held(w=piece))

    run_ranks(2, save)
    (name,) = (name for name in store.names() if "-with-" in name)
    assert name.endswith("-with-custom.txt") and store.get(name) == b"5 [0, 0, 1, 1]"


def test_a_folder_is_committed_file_by_file(tmp_path):
    with Checkpointer(FileStore(tmp_path), save_function=as_folder) as checkpointer:
        checkpointer.save(1, m=Held(w=np.arange(3))).wait()
        assert checkpointer.verify(1) == []
    assert further(tmp_path) == ["custom/deep-w", "custom/deep/w.npy", "custom/step"]


@pytest.mark.parametrize(
    ("function", "files"),
    [(as_text, ["custom.txt"]), (as_folder, ["custom/deep-w", "custom/deep/w.npy", "custom/step"])],
)
def test_what_it_wrote_goes_with_its_checkpoint(tmp_path, function, files):
    with Checkpointer(FileStore(tmp_path), retention=Retention(last=1), save_function=function) as checkpointer:
        for step in (1, 2, 2):
            checkpointer.save(step, m=Held(w=np.arange(3))).wait()
    assert further(tmp_path) == files and len([*tmp_path.iterdir()]) == 2, "the step and what bears the hold"


def test_a_checkpoint_whose_further_file_is_damaged_is_not_whole(tmp_path):
    with Checkpointer(FileStore(tmp_path), save_function=as_text) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, m=Held(w=np.arange(3))).wait()
    (file,) = (tmp_path / "step-00000002").glob("*-with-custom.txt")
    file.write_text(file.read_text().replace("0", "9"))
    checkpointer, live = Checkpointer(FileStore(tmp_path)), Held(w=np.zeros(3, int))
    assert checkpointer.restore(m=live) == 1
    assert checkpointer.problems == [f"step-00000002/{file.name}: does not match its digest in the manifest"]


def test_an_export_nobody_knows_is_refused_at_once():
    with pytest.raises(ConfigError, match=r"export is 'fp8'; use .*fp32.*bf16"):
        Checkpointer(MemoryStore(), export="fp8")


@pytest.mark.parametrize(
    ("function", "said"), [(failing, "failing failed: ValueError: no such format"), (nothing, "wrote nothing")]
)
def test_its_failure_fails_the_save_and_leaves_nothing(tmp_path, function, said):
    with Checkpointer(FileStore(tmp_path)) as checkpointer:
        checkpointer.save(1, m=Held(w=np.arange(3))).wait()
    with Checkpointer(FileStore(tmp_path), save_function=function) as checkpointer:
        with pytest.raises(CheckpointError, match=said):
            checkpointer.save(2, m=Held(w=np.arange(3))).wait()
        assert checkpointer.steps() == [1] and checkpointer.verify(1) == []
    assert not further(tmp_path) and not (tmp_path / "step-00000002").exists()
