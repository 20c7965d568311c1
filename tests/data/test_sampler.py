from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfleet.data.order import Blocks, epoch_order
from trainfleet.data.sampler import Sampler, Span, next_span, share_of
from trainfleet.errors import DataError

SHORTS = ("drop", "pad", "keep")


@settings(max_examples=200)
@given(
    n=st.integers(1, 60),
    size=st.integers(1, 5),
    world_size=st.integers(1, 5),
    begin=st.integers(0, 59),
    short=st.sampled_from(SHORTS),
)
def test_the_shares_of_a_span_are_exactly_the_span_and_none_is_empty(n, size, world_size, begin, short):
    span, _ = next_span(0, min(begin, n - 1), num_samples=n, step=size * world_size, short=short)
    if short == "drop" and span.size < size * world_size:
        return  # refused before: the epoch is shorter than a step
    shares = [share_of(span, rank=r, world_size=world_size, size=size, short=short) for r in range(world_size)]
    real = [p for share in shares for p, w in zip(share.positions.tolist(), share.weights.tolist()) if w]
    assert real == list(range(span.begin, span.end))
    assert all(len(share.positions) >= 1 for share in shares)
    assert all(share.positions.max() < span.end for share in shares)
    assert len({share.weighted for share in shares}) == 1
    if any((share.weights == 0).any() for share in shares):
        assert shares[0].weighted
    if short == "pad":
        assert all(len(share.positions) == size for share in shares)


def test_the_rest_of_an_epoch_is_dropped_only_when_the_next_step_does_not_fit():
    assert next_span(0, 8, num_samples=11, step=4, short="drop") == (Span(1, 0, 4), 3)
    assert next_span(0, 8, num_samples=11, step=3, short="drop") == (Span(0, 8, 11), 0)
    assert next_span(0, 8, num_samples=11, step=4, short="keep") == (Span(0, 8, 11), 0)


@pytest.mark.parametrize("short", SHORTS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_torch_dataloader_takes_its_indices_from_the_sampler(short, world_size):
    torch_data = pytest.importorskip("torch.utils.data")
    source = list(range(50))
    samplers = [Sampler(source, size=4, rank=r, world_size=world_size, seed=3, short=short) for r in range(world_size)]
    loaders = [torch_data.DataLoader(source, batch_size=4, sampler=sampler) for sampler in samplers]
    for epoch in range(2):
        announced = [len(sampler) for sampler in samplers]
        batches = [[batch.tolist() for batch in loader] for loader in loaders]
        assert [sum(map(len, mine)) for mine in batches] == announced
        assert len({len(mine) for mine in batches}) == 1
        together = [index for step in zip(*batches) for batch in step for index in batch]
        order = list(epoch_order(num_samples=50, seed=3, epoch=epoch))
        if short == "drop":
            assert together == order[: 50 // (4 * world_size) * 4 * world_size]
        else:
            assert together[:50] == order


def test_a_sampler_resumes_after_the_batches_that_were_used():
    torch_data = pytest.importorskip("torch.utils.data")
    source = list(range(40))
    sampler = Sampler(source, size=4, seed=1)
    loader = torch_data.DataLoader(source, batch_size=4, sampler=sampler, num_workers=1)
    batches = iter(loader)
    used = [next(batches).tolist() for _ in range(3)]
    state = sampler.state_dict(batches=3)  # the loader's worker is further on
    resumed = Sampler(source, size=2, world_size=2, rank=0, seed=99)
    other = Sampler(source, size=2, world_size=2, rank=1, seed=99)
    resumed.load_state_dict(state)
    other.load_state_dict(state)
    rest = [i for pair in zip(zip(*[iter(resumed)] * 2), zip(*[iter(other)] * 2)) for two in pair for i in two]
    assert [i for batch in used for i in batch] + rest == list(epoch_order(num_samples=40, seed=1))


def test_a_sampler_is_at_the_next_epoch_after_its_last_index():
    sampler = Sampler(10, size=5)
    first, second = list(sampler), list(sampler)
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert sampler.state_dict()["epoch"] == 2


@pytest.mark.parametrize(
    ("num_samples", "settings", "sentence"),
    [
        (7, {"size": 4, "world_size": 2}, r"7 samples, fewer than one micro-batch of all ranks \(2 x 4 = 8\)"),
        (1, {"size": 4, "world_size": 2, "short": "keep"}, "1 samples for 2 ranks"),
        (0, {"size": 1}, "empty"),
        (9, {"size": 0}, "at least 1"),
        (9, {"size": 1, "rank": 2, "world_size": 2}, "Rank 2 does not exist"),
        (9, {"size": 1, "short": "cut"}, "'drop', 'pad' or 'keep'"),
    ],
)
def test_what_cannot_be_dealt_out_is_refused(num_samples, settings, sentence):
    with pytest.raises(DataError, match=sentence):
        Sampler(num_samples, **settings)


def test_a_position_in_another_dataset_is_refused():
    state = Sampler(10, size=2).state_dict()
    with pytest.raises(DataError, match="10 samples, but this one has 11"):
        Sampler(11, size=2).load_state_dict(state)


def test_a_sampler_of_a_source_in_blocks_has_the_order_of_its_blocks():
    class Blocky:
        blocks = Blocks((8,) * 5, 2)

        def __len__(self):
            return 40

    order = list(epoch_order(num_samples=40, seed=3, blocks=Blocky.blocks))
    assert list(Sampler(Blocky(), size=4, seed=3)) == order != list(epoch_order(num_samples=40, seed=3))
