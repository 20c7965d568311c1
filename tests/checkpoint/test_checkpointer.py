"""What is saved comes back, on one rank and on several, or is refused by name."""

from __future__ import annotations

import random
import subprocess
import sys
from datetime import timedelta

import numpy as np
import pytest
from held import Held

from trainfleet.checkpoint import Checkpointer, Retention
from trainfleet.comm.threads import run_ranks
from trainfleet.errors import CheckpointError
from trainfleet.state import PerRank, ShardedArray
from trainfleet.store import FileStore, MemoryStore

SHORT = timedelta(seconds=20)


def saved(store, step=1, *, metadata=None, **statefuls):
    with Checkpointer(store, retention=Retention(last=100)) as checkpointer:
        checkpointer.save(step, metadata=metadata, **statefuls).wait()
    return checkpointer


def test_a_state_comes_back_in_place():
    store = MemoryStore()
    saved(store, 7, m=Held(w=np.arange(6.0).reshape(2, 3), n=3, lr=0.1, name="x", deep={"b": np.bool_(True)}))
    live = Held(w=np.zeros((2, 3)), n=0, lr=0.0, name="", deep={"b": np.bool_(False)})
    w = live.value["w"]
    assert Checkpointer(store).restore(m=live) == 7
    assert live.value["w"] is w
    assert (w == np.arange(6.0).reshape(2, 3)).all()
    assert live.value | {"w": None} == {"w": None, "n": 3, "lr": 0.1, "name": "x", "deep": {"b": True}}


def test_without_a_checkpoint_there_is_nothing_to_restore():
    live = Held(x=1)
    assert Checkpointer(MemoryStore()).restore(m=live) is None
    assert live.loads == 0
    assert not Checkpointer(MemoryStore()).has_checkpoint()


def test_what_is_changed_after_save_returns_is_not_what_was_saved():
    store = MemoryStore()
    w = np.ones(100_000)
    checkpointer = Checkpointer(store)
    save = checkpointer.save(1, m=Held(w=w))
    w[:] = 2
    save.wait()
    live = Held(w=np.zeros(100_000))
    checkpointer.restore(m=live)
    assert (live.value["w"] == 1).all()


def test_a_torch_loop_goes_on_to_the_bit(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")

    class Generators:
        def state_dict(self):
            return {"torch": PerRank(torch.get_rng_state()), "python": PerRank(random.getstate())}

        def load_state_dict(self, state):
            torch.set_rng_state(state["torch"].value)
            random.setstate(state["python"].value)

    def parts():
        torch.manual_seed(random.randrange(100))
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        return {"model": model, "optimizer": optimizer, "schedule": schedule, "generators": Generators()}

    def losses(parts, steps):
        found = []
        for _ in range(steps):
            x = torch.randn(16, 4)
            loss = (parts["model"](x) - random.random()).square().mean()
            loss.backward()
            parts["optimizer"].step()
            parts["optimizer"].zero_grad()
            parts["schedule"].step()
            found.append(loss.item())
        return found

    first = parts()
    losses(first, 3)
    saved(FileStore(tmp_path), 3, **first)
    expected = losses(first, 4)
    second = parts()
    assert Checkpointer(FileStore(tmp_path)).restore(**second) == 3  # the optimizer is fresh: its state is empty
    assert losses(second, 4) == expected


def test_numpy_state_needs_no_torch(tmp_path):
    code = """
import sys, numpy as np
from trainfleet.checkpoint import Checkpointer
from trainfleet.store import FileStore
class Held:
    def __init__(self, w): self.w = w
    def state_dict(self): return {"w": self.w, "bits": {}}
    def load_state_dict(self, state): self.w = state["w"]
with Checkpointer(FileStore(sys.argv[1])) as c:
    c.save(1, m=Held(np.arange(5)))
live = Held(np.zeros(5, int))
assert Checkpointer(FileStore(sys.argv[1])).restore(m=live) == 1
assert live.w.tolist() == [0, 1, 2, 3, 4]
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)


# what does not fit


@pytest.mark.parametrize(
    ("live", "words"),
    [
        (Held(w=np.zeros((2, 2), np.float32), v=1), "m/v is missing"),
        (Held(), "fits because an empty state takes all"),
        (Held(other=np.zeros(1)), "m/w is in the checkpoint and not here"),
        (Held(w=np.zeros((2, 3), np.float32)), r"m/w has shape \(2, 2\) in the checkpoint and \(2, 3\) here"),
        (Held(w=np.zeros((4,), np.float32)), r"m/w has shape"),
        (Held(w=np.zeros((2, 2), np.float16)), "m/w has dtype float32 in the checkpoint and float16 here"),
        (Held(w=1), "m/w is an array in the checkpoint and here of type int"),
        (Held(w={"x": np.zeros(1)}), "m/w is an array in the checkpoint and here a mapping"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_touched(live, words):
    store = MemoryStore()
    saved(store, m=Held(w=np.ones((2, 2), np.float32)), other=Held(x=np.ones(1)))
    other = Held(x=np.zeros(1))
    if "fits" in words:
        assert Checkpointer(store).restore(m=live, other=other) == 1
        assert (live.value["w"] == 1).all()
        return
    before = dict(live.value)
    with pytest.raises(CheckpointError, match=words):
        Checkpointer(store).restore(m=live, other=other)
    assert live.loads == other.loads == 0
    assert live.value.keys() == before.keys()
    assert other.value["x"] == 0


def test_arrays_deep_inside_are_compared_too():
    store = MemoryStore()
    saved(store, m=Held(layers=[{"w": np.ones(2)}, {"w": np.ones(2)}], extra={"a": np.ones(1), "n": 1}))
    good = Held(layers=[{"w": np.zeros(2)}, {"w": np.zeros(2)}], extra={"a": np.zeros(1), "n": 0})
    assert Checkpointer(store).restore(m=good) == 1
    assert good.value["layers"][1]["w"].tolist() == [1, 1]
    with pytest.raises(CheckpointError, match="m/layers/1/w is in the checkpoint and not here"):
        Checkpointer(store).restore(m=Held(layers=[{"w": np.zeros(2)}], extra={"a": np.zeros(1), "n": 0}))
    with pytest.raises(CheckpointError, match="m/layers/2 is missing"):
        Checkpointer(store).restore(m=Held(layers=[{"w": np.zeros(2)}] * 3, extra={"a": np.zeros(1), "n": 0}))
    with pytest.raises(CheckpointError, match="m/extra/a is in the checkpoint"):
        Checkpointer(store).restore(m=Held(layers=[{"w": np.zeros(2)}] * 2, extra={"n": 0}))


def test_plain_values_below_the_top_come_as_they_were_stored():
    store = MemoryStore()
    saved(store, m=Held(groups=[{"lr": 0.1, "new": True}], seen={"a": 1, "b": 2}, best=0.5))
    live = Held(groups=[{"lr": 0.0}], seen={"a": 0, "c": 3}, best=None)
    Checkpointer(store).restore(m=live)
    assert live.value == {"groups": [{"lr": 0.1, "new": True}], "seen": {"a": 1, "b": 2}, "best": 0.5}


def test_a_whole_state_too_few_or_too_many_is_named_unless_partial():
    store = MemoryStore()
    saved(store, model=Held(x=1), optimizer=Held(y=2))
    with pytest.raises(CheckpointError, match="optimizer is in the checkpoint and not here"):
        Checkpointer(store).restore(model=Held(x=0))
    with pytest.raises(CheckpointError, match="ema is missing from the checkpoint, which holds model, optimizer"):
        Checkpointer(store).restore(model=Held(x=0), optimizer=Held(y=0), ema=Held(z=0))
    live = Held(x=0)
    assert Checkpointer(store).restore(model=live, partial=True) == 1
    assert live.value == {"x": 1}


def test_what_is_no_stateful_is_refused():
    with pytest.raises(CheckpointError, match="m is a dict and has no state_dict"):
        Checkpointer(MemoryStore()).save(1, m={"x": 1})


def test_a_negative_step_is_refused():
    with pytest.raises(CheckpointError, match="-1"):
        Checkpointer(MemoryStore()).save(-1, m=Held())


# which checkpoint


def test_the_newest_commit_is_restored_even_where_its_step_is_lower():
    store = MemoryStore()
    saved(store, 100, m=Held(x="old run"))
    saved(store, 10, m=Held(x="new run"))
    live = Held(x="")
    checkpointer = Checkpointer(store)
    assert checkpointer.restore(m=live) == 10
    assert live.value == {"x": "new run"}
    assert checkpointer.steps() == [10, 100]
    assert checkpointer.has_checkpoint()


def test_a_step_can_be_asked_for_and_must_be_there():
    store = MemoryStore()
    for step in (1, 2):
        saved(store, step, m=Held(x=step))
    live = Held(x=0)
    assert Checkpointer(store).restore(1, m=live) == 1
    assert live.value == {"x": 1}
    with pytest.raises(CheckpointError, match=r"step-00000009.*not finished"):
        Checkpointer(store).restore(9, m=live)


def test_a_step_saved_again_replaces_the_first_and_leaves_no_file_of_it():
    store = MemoryStore()
    saved(store, 5, m=Held(x=1))
    before = set(store.names())
    saved(store, 5, m=Held(x=2))
    assert set(store.names()) & before == {"step-00000005/manifest.json"}
    assert len(store.names()) == 3
    live = Held(x=0)
    Checkpointer(store).restore(m=live)
    assert live.value == {"x": 2}


def test_metadata_comes_back():
    store = MemoryStore()
    recipe = {"train": {"lr": 0.1, "steps": 10}, "nan": float("nan"), "t": (1, 2)}
    saved(store, 1, metadata=recipe, m=Held(x=1))
    found = Checkpointer(store).read_metadata(1)
    assert found["train"] == recipe["train"]
    assert found["t"] == (1, 2)
    assert np.isnan(found["nan"])
    with pytest.raises(CheckpointError, match="step-00000002"):
        Checkpointer(store).read_metadata(2)
    with pytest.raises(CheckpointError, match="metadata/x is an array"):
        Checkpointer(store).save(1, metadata={"x": np.zeros(1)}, m=Held())


# several ranks


def pieces_of(whole, rank, size):
    """This rank's rows of `whole`, cut unevenly."""
    cuts = [0, *(len(whole) * (r + 1) // size for r in range(size))]
    local = whole[cuts[rank] : cuts[rank + 1]].copy()
    return ShardedArray(
        name="w", global_shape=whole.shape, offsets=(cuts[rank],) + (0,) * (whole.ndim - 1), local=local
    )


WHOLE = np.arange(30.0).reshape(10, 3)


def test_four_ranks_save_and_any_number_restore():
    store = MemoryStore()

    def save(group):
        state = Held(w=pieces_of(WHOLE, group.rank, 4), n=group.rank, own=PerRank({"seed": np.array([group.rank])}))
        with Checkpointer(store, group=group, timeout=SHORT) as checkpointer:
            checkpointer.save(3, m=state).wait()

    run_ranks(4, save)

    def restore(group):
        blank = pieces_of(np.zeros_like(WHOLE), group.rank, group.size)
        live = Held(w=blank, n=-1, own=PerRank({"seed": np.array([-1])}))
        checkpointer = Checkpointer(store, group=group)
        assert checkpointer.restore(m=live) == 3
        assert live.value["n"] == 0  # that of rank 0 stands for all
        return live.value["w"].local, int(live.value["own"].value["seed"][0]), checkpointer.problems

    for size in (1, 2, 3, 4, 5):
        found = run_ranks(size, restore)
        assert (np.concatenate([local for local, _, _ in found]) == WHOLE).all()
        assert [seed for _, seed, _ in found] == [*range(4), -1][:size]
        assert [len(problems) for _, _, problems in found] == [0, 0, 0, 0, 1][:size]
    assert "m/own: not stored for rank 4" in found[4][2][0]


def test_copies_are_stored_once():
    store = MemoryStore()

    def save(group):
        piece = ShardedArray(name="w", global_shape=(5,), offsets=(0,), local=np.arange(5.0), replica=group.rank)
        with Checkpointer(store, group=group, timeout=SHORT) as checkpointer:
            return checkpointer.save(3, m=Held(w=piece, plain=np.ones(2))).num_bytes

    assert run_ranks(3, save) == [56, 0, 0]


def test_ranks_with_different_parts_find_their_own():
    """As in a pipeline: each rank has arrays that the others have not."""
    store = MemoryStore()

    def state(rank, value):
        whole = np.full(3, float(value))
        return Held(**{f"layer{rank}": ShardedArray(name="l", global_shape=(3,), offsets=(0,), local=whole)}, n=1)

    def save(group):
        with Checkpointer(store, group=group, timeout=SHORT) as checkpointer:
            checkpointer.save(1, m=state(group.rank, group.rank + 1))

    def restore(group):
        live = state(group.rank, 0)
        assert Checkpointer(store, group=group).restore(m=live) == 1
        return live.value[f"layer{group.rank}"].local.tolist()

    run_ranks(2, save)
    assert run_ranks(2, restore) == [[1, 1, 1], [2, 2, 2]]
    with pytest.raises(CheckpointError, match="m/layer1 is in the checkpoint and not here"):
        Checkpointer(store).restore(m=state(0, 0))


def test_a_misfit_on_one_rank_stops_all_before_any_is_touched():
    store = MemoryStore()

    def save(group):
        with Checkpointer(store, group=group, timeout=SHORT) as checkpointer:
            checkpointer.save(1, m=Held(w=pieces_of(WHOLE, group.rank, 2)))

    run_ranks(2, save)

    def restore(group):
        blank = np.zeros((10, 3), np.float32 if group.rank else np.float64)
        live = Held(w=pieces_of(blank, group.rank, 2))
        with pytest.raises(CheckpointError, match="m/w has dtype float64 in the checkpoint and float32 here"):
            Checkpointer(store, group=group).restore(m=live)
        assert live.loads == 0
        assert not live.value["w"].local.any()

    run_ranks(2, restore)


def test_a_rank_that_fails_while_restoring_stops_the_others(monkeypatch):
    store = MemoryStore()

    def save(group):
        with Checkpointer(store, group=group, timeout=SHORT) as checkpointer:
            checkpointer.save(1, m=Held(w=pieces_of(WHOLE, group.rank, 2)))

    run_ranks(2, save)

    class Failing(MemoryStore):
        def open(self, name):
            raise ZeroDivisionError("a bug")

    failing = Failing()
    failing._held = store._held

    def restore(group):
        live = Held(w=pieces_of(WHOLE, group.rank, 2))
        try:
            Checkpointer(failing if group.rank else store, group=group).restore(m=live)
        except Exception as error:
            return type(error).__name__, str(error)
        return None

    (kind0, said0), (kind1, _) = run_ranks(2, restore)
    assert kind1 == "ZeroDivisionError"
    assert kind0 == "CheckpointError"
    assert "rank 1 failed: ZeroDivisionError: a bug" in said0


# how saves end


def test_old_checkpoints_are_removed_after_the_new_one_stands():
    store = MemoryStore()
    with Checkpointer(store, retention=Retention(last=2, every=4)) as checkpointer:
        for step in range(1, 8):
            checkpointer.save(step, m=Held(x=step))
    assert checkpointer.steps() == [4, 6, 7]
    assert {name.partition("/")[0] for name in store.names()} == {f"step-0000000{n}" for n in (4, 6, 7)}
