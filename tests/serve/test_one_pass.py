"""One pass knows where each batch ended, however far the model reads ahead, and goes on from there."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

pytest.importorskip("torch", reason="the streams are torch's")
from serving import Points, stream

from trainfleet.batch import batch_size
from trainfleet.data import IterableBatches, LocalBatches
from trainfleet.errors import ConfigError, DataError, PeerError
from trainfleet.serve.one_pass import OnePass
from trainfleet.serve.terms import Terms

PREDICT = Terms(task="predict")


class Echo:
    """Answers with the sums of inputs as values; takes all batches before the first answer where `ahead`."""

    digest = "0"

    def __init__(self, *, ahead: bool = False, lost: int = 0, more: int = 0) -> None:
        self.ahead, self.lost, self.more = ahead, lost, more

    def answers(self, batches, terms):
        batches = list(batches) if self.ahead else batches
        for batch in itertools.islice(batches, len(batches) - self.lost) if self.lost else batches:
            rows = batch_size(batch) + self.more
            values = np.resize(np.asarray(batch["input"]).sum(1), rows).astype(np.float32)
            yield {"rows": np.array(rows), "kept": np.arange(rows, dtype=np.int32), "values": values}


def run(walk, model=None):
    return [(answer["values"].tolist(), state) for answer, state in walk.answers(model or Echo(), PREDICT, None)]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("settings", [{}, {"epochs": 1}, {"workers": 2}])
def test_each_answer_comes_with_the_place_behind_its_batch(ahead, settings):
    with stream(size=20, **settings) as batches:
        whole = run(OnePass(batches, in_order=True), Echo(ahead=ahead))
        assert [len(values) for values, _ in whole] == [20, 20, 20, 20, 20, 3]
        for done, (_, state) in enumerate(whole, 1):
            walk = OnePass(batches, in_order=True)
            walk.skip_to(min(20 * done, 103), state)
            assert [values for values, _ in run(walk)] == [values for values, _ in whole[done:]]
            assert walk.position == 103


def test_a_pass_goes_on_with_batches_of_another_size():
    state = run(OnePass(stream(size=20), in_order=True))[1][1]
    walk = OnePass(stream(size=7), in_order=True)
    walk.skip_to(40, state)
    assert [len(values) for values, _ in run(walk)] == [7] * 9


def test_what_is_only_iterated_is_read_again_to_where_it_was():
    batches = list(stream(size=20, epochs=1))
    walk = OnePass(batches, in_order=True)
    walk.skip_to(60, None)
    assert len(run(walk)) == 3
    with pytest.raises(DataError, match="end after 103 rows"):
        OnePass(batches, in_order=True).skip_to(104, None)


def test_an_iterable_source_goes_on_too():
    def source():
        return IterableBatches([Points()[i] for i in range(103)], size=20, short="keep", epochs=1)

    whole = run(OnePass(source(), in_order=True))
    assert len(whole) == 6
    walk = OnePass(source(), in_order=True)
    walk.skip_to(40, whole[1][1])
    assert run(walk)[0] == whole[2]


def test_the_first_row_tells_one_source_from_another():
    digest = OnePass(stream(size=20), in_order=True).first_digest()
    assert digest == OnePass(stream(size=7), in_order=True).first_digest()
    points = Points()
    points.inputs[0, 0] += 1
    assert digest != OnePass(stream(points), in_order=True).first_digest()
    walk = OnePass(stream(size=20), in_order=True)
    walk.first_digest()
    assert len(run(walk)) == 6


def test_predictions_of_shuffled_or_dealt_data_are_refused():
    for settings in ({"shuffle": True}, {"shuffle": False, "world_size": 2}):
        with pytest.raises(ConfigError, match="which sample"):
            OnePass(LocalBatches(Points(), size=4, **settings), in_order=True)
    OnePass(LocalBatches(Points(), size=4), in_order=False)


def test_answers_too_few_or_of_other_rows_are_noticed():
    with pytest.raises(PeerError, match="2 batches were left"):
        run(OnePass(stream(size=20), in_order=True), Echo(ahead=True, lost=2))
    with pytest.raises(PeerError, match="for 21 rows, and its batch has 20"):
        run(OnePass(stream(size=20), in_order=True), Echo(more=1))


def test_batches_of_any_kind_have_a_first_row():
    torch = pytest.importorskip("torch")

    class Odd:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return {"x": torch.full((2,), index + 1, dtype=torch.bfloat16), "name": f"n{index}", "n": np.int8(index)}

    def named(samples):
        return {"x": torch.stack([s["x"] for s in samples]), "name": np.array([s["name"] for s in samples], object)}

    assert len({OnePass(LocalBatches(Odd(), size=2, shuffle=False, collate=c), in_order=True).first_digest()
                for c in (None, named)}) == 2  # fmt: skip
