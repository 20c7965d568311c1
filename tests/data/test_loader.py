from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfleet.batch import BatchStream
from trainfleet.data.config import DataConfig, SourceConfig
from trainfleet.data.loader import LocalBatches
from trainfleet.data.order import Blocks, epoch_order
from trainfleet.data.split import Part
from trainfleet.errors import DataError


class Numbers:
    """Sample i is {"i": i}; a few of them may be bad."""

    def __init__(self, length, bad=()):
        self.length, self.bad = length, set(bad)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index in self.bad:
            raise ValueError(f"{index} is rotten")
        return {"i": index}


def jitter(sample, rng):
    return {**sample, "noise": rng.standard_normal(3, np.float32)}


def jitter_by_globals(sample):
    return {**sample, "noise": np.random.rand(3), "more": random.random()}


def open_ranks(source, *, size, world_size, **settings):
    settings.setdefault("collate", "numpy")
    return [LocalBatches(source, size=size, rank=r, world_size=world_size, **settings) for r in range(world_size)]


def real(batch):
    """The samples of a batch that count."""
    weights = batch.get("weight", np.ones(len(batch["i"])))
    return [int(i) for i, w in zip(batch["i"], weights) if w]


def take(ranks, steps):
    """The samples of all ranks over so many steps, in global order."""
    return [i for _ in range(steps) for stream in ranks for i in real(next(stream))]


def close(ranks):
    for stream in ranks:
        stream.close()


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_stream_of_samples_is_the_same_for_any_ranks_and_workers(world_size, workers):
    expected = [i for epoch in range(3) for i in list(epoch_order(num_samples=103, seed=7, epoch=epoch))[:96]]
    ranks = open_ranks(Numbers(103), size=12 // world_size, world_size=world_size, workers=workers, seed=7)
    try:
        assert take(ranks, 24) == expected
        states = [stream.state_dict() for stream in ranks]
        assert all(state == states[0] for state in states)
        assert states[0] == {
            "epoch": 2, "position": 96, "seed": 7, "shuffle": True, "samples": 103, "dropped": 14
        }  # fmt: skip
    finally:
        close(ranks)


@pytest.mark.parametrize("transform", [jitter, jitter_by_globals])
def test_augmentation_is_the_same_to_the_bit_for_any_ranks_and_workers(transform):
    def stream(world_size, workers):
        ranks = open_ranks(
            Numbers(40), size=8 // world_size, world_size=world_size, workers=workers, transform=transform
        )
        batches = [next(s) for _ in range(8) for s in ranks]
        close(ranks)
        return [np.concatenate([b[key] for b in batches]) for key in sorted(batches[0])]

    once = stream(1, 0)
    for world_size, workers in ((1, 2), (2, 0), (2, 1)):
        for mine, its in zip(stream(world_size, workers), once):
            assert mine.tobytes() == its.tobytes()
    noise = once[sorted(["i", "noise"]).index("noise")] if transform is jitter else once[2]
    assert len(np.unique(noise.round(6), axis=0)) == len(noise)  # another draw in another epoch


def test_making_samples_in_the_loop_leaves_the_global_generators_alone():
    torch = pytest.importorskip("torch")
    stream = LocalBatches(Numbers(8), size=4, transform=jitter_by_globals)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    next(stream)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == before


@settings(max_examples=60)
@given(
    n=st.integers(12, 80),
    short=st.sampled_from(["keep", "pad"]),
    stays=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=12),
)
def test_changing_ranks_and_sizes_repeats_and_loses_no_sample(n, short, stays):
    """A run that is stopped and resumed at other world sizes sees each sample once an epoch."""
    state, seen = None, []
    for world_size, size, steps in stays:
        ranks = open_ranks(Numbers(n), size=size, world_size=world_size, short=short)
        for stream in ranks:
            if state is not None:
                stream.load_state_dict(state)
        seen += take(ranks, steps)
        states = [stream.state_dict() for stream in ranks]
        assert all(s == states[0] for s in states)
        state = states[0]
    endless = [i for epoch in range(2 + len(seen) // n) for i in epoch_order(num_samples=n, epoch=epoch)]
    assert seen == endless[: len(seen)]
    assert (state["epoch"] * n + state["position"]) == len(seen)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_made_ahead_do_not_count_as_consumed(workers):
    with LocalBatches(Numbers(50), size=5, workers=workers, prefetch=3, collate="numpy") as stream:
        first = [real(next(stream)) for _ in range(3)]
        state = stream.state_dict()
        rest = [real(next(stream)) for _ in range(5)]
        stream.load_state_dict(state)  # back, while workers are ahead
        assert [real(next(stream)) for _ in range(5)] == rest
    assert state["position"] == 15
    assert len({i for batch in first + rest for i in batch}) == 40


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("short", "sizes"), [("drop", [4, 4]), ("keep", [4, 4, 3]), ("pad", [4, 4, 4])])
def test_a_finite_stream_ends_after_its_epochs_and_can_be_rewound(short, sizes, workers):
    with LocalBatches(
        Numbers(11), size=4, epochs=2, short=short, workers=workers, shuffle=False, collate="numpy"
    ) as stream:
        assert stream.batches_per_epoch == len(sizes)
        first = [batch["i"].tolist() for batch in stream]
        assert [len(batch) for batch in first] == sizes * 2
        assert next(stream, None) is None
        stream.rewind()
        assert [batch["i"].tolist() for batch in stream] == first


def test_pad_fills_the_last_batch_with_samples_of_weight_zero_on_every_rank():
    ranks = open_ranks(Numbers(10), size=4, world_size=2, short="pad", shuffle=False, epochs=1)
    batches = [list(stream) for stream in ranks]
    assert [b["i"].tolist() for b in batches[0]] == [[0, 1, 2, 3], [8, 9, 0, 1]]
    assert [b["i"].tolist() for b in batches[1]] == [[4, 5, 6, 7], [2, 3, 4, 5]]
    assert [b["weight"].tolist() for b in batches[0]] == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert [b["weight"].tolist() for b in batches[1]] == [[1, 1, 1, 1], [0, 0, 0, 0]]
    assert batches[0][0]["weight"].dtype == np.float32


def test_keep_splits_the_rest_evenly_and_fills_a_rank_without_any_at_weight_zero():
    ranks = open_ranks(Numbers(11), size=4, world_size=2, short="keep", shuffle=False, epochs=1)
    batches = [list(stream) for stream in ranks]
    assert [b["i"].tolist() for b in batches[0]] == [[0, 1, 2, 3], [8, 9]]
    assert [b["i"].tolist() for b in batches[1]] == [[4, 5, 6, 7], [10]]
    assert not any("weight" in b for mine in batches for b in mine)
    ranks = open_ranks(Numbers(9), size=4, world_size=2, short="keep", shuffle=False, epochs=1)
    last = [list(stream)[-1] for stream in ranks]
    assert [(b["i"].tolist(), b["weight"].tolist()) for b in last] == [([8], [1]), ([8], [0])]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_ends_the_run_with_its_index_source_and_cause(workers):
    with LocalBatches(Numbers(20, bad=[6]), size=4, shuffle=False, workers=workers, collate="numpy") as stream:
        next(stream)
        for _ in range(2):  # asked again, it says it again
            with pytest.raises(DataError, match="Sample 6 of the source Numbers failed: ValueError: 6 is rot") as info:
                next(stream)
        assert "bad='skip'" in info.value.hint
        assert "is rotten" in str(info.value.__cause__)
        assert stream.state_dict()["position"] == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_samples_keep_their_slot_at_weight_zero_and_are_counted(workers):
    told = []
    with LocalBatches(
        Numbers(12, bad=[1, 5, 8, 9, 10, 11]),
        size=4,
        shuffle=False,
        bad="skip",
        workers=workers,
        collate="numpy",
        on_skip=lambda count, example: told.append((count, example)),
    ) as stream:
        batches = [next(stream) for _ in range(3)]
        assert stream.skipped == 6
    assert [b["weight"].tolist() for b in batches] == [[1, 0, 1, 1], [1, 0, 1, 1], [0, 0, 0, 0]]
    assert [real(b) for b in batches] == [[0, 2, 3], [4, 6, 7], []]
    assert [len(b["i"]) for b in batches] == [4, 4, 4]
    assert told == [(1, "sample 1: ValueError: 1 is rotten"), (1, "sample 5: ValueError: 5 is rotten"),
                    (4, "sample 8: ValueError: 8 is rotten")]  # fmt: skip


def test_a_source_of_nothing_but_bad_samples_ends_even_if_they_may_be_skipped():
    with pytest.raises(DataError, match="are all bad; the first: sample 0: ValueError: 0 is rotten"):
        next(LocalBatches(Numbers(8, bad=range(8)), size=4, bad="skip", shuffle=False))


@dataclass
class Pair:
    x: np.ndarray
    weight: float = 1.0


@pytest.mark.parametrize(
    ("sample", "weights"),
    [
        ({"x": 1.0}, lambda batch: batch["weight"]),
        ((1.0, 2.0), lambda batch: batch[2]),
        (Pair(np.ones(2)), lambda batch: batch.weight),
        (3.5, lambda batch: batch[1]),
        ({"x": 1, "weight": 0.5}, lambda batch: batch["weight"] * 2),
    ],
)
def test_weights_find_their_place_in_any_kind_of_batch(sample, weights):
    batches = list(LocalBatches([sample] * 3, size=2, short="pad", epochs=1, collate="numpy"))
    assert [np.asarray(weights(batch)).tolist() for batch in batches] == [[1, 1], [1, 0]]


def test_batches_are_tensors_where_torch_is_installed_and_numpy_where_asked():
    torch = pytest.importorskip("torch")
    source = [{"x": np.ones(3, np.float32), "name": "a"}] * 4
    batch = next(LocalBatches(source, size=2))
    assert isinstance(batch["x"], torch.Tensor) and batch["x"].dtype == torch.float32 and batch["name"] == ["a", "a"]
    assert isinstance(next(LocalBatches(source, size=2, collate="numpy"))["x"], np.ndarray)
    assert isinstance(next(LocalBatches([torch.ones(3)] * 4, size=2, collate="numpy")), np.ndarray)


def test_collate_is_a_function_of_the_samples():
    assert next(LocalBatches(list("abcd"), size=2, shuffle=False, collate="".join)) == "ab"
    with pytest.raises(DataError, match="collate failed on samples 0 to 1 of the source list: TypeError"):
        next(LocalBatches([1, 2], size=2, shuffle=False, collate="".join))


def test_a_position_of_another_dataset_or_order_is_refused_and_another_seed_is_taken_over(caplog):
    state = LocalBatches(Numbers(20), size=4, seed=5).state_dict() | {"position": 8}
    with pytest.raises(DataError, match="20 samples, but this one has 21"):
        LocalBatches(Numbers(21), size=4).load_state_dict(state)
    with pytest.raises(DataError, match="shuffle=True"):
        LocalBatches(Numbers(20), size=4, shuffle=False).load_state_dict(state)
    stream = LocalBatches(Numbers(20), size=4, seed=6, collate="numpy")
    stream.load_state_dict(state)
    assert real(next(stream)) == list(epoch_order(num_samples=20, seed=5))[8:12]
    assert "seed 5" in caplog.text


def test_a_closed_stream_says_so_and_closes_twice():
    stream = LocalBatches(Numbers(20), size=4, workers=1)
    assert isinstance(stream, BatchStream)
    next(stream)
    stream.close()
    stream.close()
    with pytest.raises(DataError, match="closed"):
        next(stream)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"size": 21}, "fewer than one micro-batch"),
        ({"size": 2, "workers": -1}, "workers=-1"),
        ({"size": 2, "prefetch": 0}, "prefetch=0"),
        ({"size": 2, "bad": "ignore"}, "'raise' or 'skip'"),
    ],
)
def test_impossible_settings_are_refused(settings, sentence):
    with pytest.raises(DataError, match=sentence):
        LocalBatches(Numbers(20), **settings)


def test_an_iterable_is_sent_to_the_other_class():
    with pytest.raises(DataError, match="IterableBatches"):
        LocalBatches(iter([1, 2]), size=1)


def test_a_position_in_another_window_of_blocks_is_refused():
    class Blocky(list):
        def expect(self, present, ahead):
            pass

    def stream(window):
        source = Blocky(range(40))
        source.blocks = Blocks((8,) * 5, window)
        return LocalBatches(source, size=4)

    state = stream(2).state_dict()
    stream(2).load_state_dict(state)
    LocalBatches(list(range(40)), size=4).load_state_dict(state)
    with pytest.raises(DataError, match="windows of 2 shards, but this source has windows of 3"):
        stream(3).load_state_dict(state)


def held_out_and_rest(workers=0, **settings):
    config = DataConfig(
        source="data.test_loader:Hundred",
        evaluation=SourceConfig(fraction=0.2, **settings),
        workers=workers,
        collate="data.test_loader:as_list",
    )
    with config.open_training(size=8, seed=3) as training, config.open_evaluation(size=8, seed=9) as evaluation:
        epoch = [index for _ in range(training.batches_per_epoch) for index in next(training)]
        return [index for batch in evaluation for index in batch], epoch


class Hundred:
    def __len__(self):
        return 100

    def __getitem__(self, index):
        return index


def as_list(samples):
    return list(samples)


def test_what_is_held_out_is_never_trained_on_and_does_not_depend_on_seed_or_workers_of_the_run():
    held_out, trained = held_out_and_rest()
    assert len(held_out) == 20 and held_out == sorted(held_out) and len(trained) == 80
    assert sorted(held_out + trained) == list(range(100)) and trained != sorted(trained)
    assert held_out_and_rest(workers=2) == (held_out, trained)
    assert held_out_and_rest(seed=1)[0] != held_out


def test_a_place_in_another_split_is_refused():
    streams = [
        LocalBatches(Hundred(), size=8, part=Part(Hundred(), 0.2, seed=seed, held_out=False), collate="numpy")
        for seed in (0, 0, 1)
    ]
    next(streams[0])
    streams[1].load_state_dict(streams[0].state_dict())
    assert (next(streams[1]) == next(streams[0])).all()
    with pytest.raises(DataError, match="what was trained on would be held out"):
        streams[2].load_state_dict(streams[0].state_dict())


def test_epochs_are_done_with_their_last_batch():
    stream = LocalBatches(Hundred(), size=30, collate="numpy")
    done = [stream.epochs_done]
    for _ in range(7):
        next(stream)
        done.append(stream.epochs_done)
    assert done == [0, 0, 0, 1, 1, 1, 2, 2]
