from __future__ import annotations

import numpy as np
import pytest

from trainfleet.data.config import BatchConfig, DataConfig, SourceConfig
from trainfleet.data.iterable import IterableBatches
from trainfleet.data.loader import LocalBatches
from trainfleet.data.pixels import Pixels
from trainfleet.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "ranks", "resolved"),
    [
        ({"global_batch": 32, "micro_batch": 4}, 2, (4, 4, 32)),
        ({"global_batch": 32, "accumulation": 2}, 4, (4, 2, 32)),
        ({"micro_batch": 3, "accumulation": 5}, 2, (3, 5, 30)),
        ({"global_batch": 32, "micro_batch": 8, "accumulation": 2}, 2, (8, 2, 32)),
        ({"global_batch": 32}, 4, (8, 1, 32)),
        ({"micro_batch": 8}, 4, (8, 1, 32)),
    ],
)
def test_any_two_sizes_give_the_third(given, ranks, resolved):
    micro, accumulation, whole = BatchConfig(**given).resolve(ranks)
    assert (micro, accumulation, whole) == resolved and micro * accumulation * ranks == whole


@pytest.mark.parametrize(
    ("given", "ranks", "sentence"),
    [
        ({"global_batch": 32, "micro_batch": 8, "accumulation": 3}, 2, "8 x 3 x 2 = 48, but batch.global_batch is 32"),
        ({"global_batch": 30, "micro_batch": 4}, 2, "= 4 x 2 = 8. Use a global_batch of 24 or 32"),
        ({"global_batch": 3, "micro_batch": 2}, 2, "= 2 x 2 = 4. Use a global_batch of 4,"),
        ({"global_batch": 2}, 4, "fewer samples than the 4 data ranks"),
        ({"accumulation": 2}, 1, "No batch size"),
        ({}, 1, "No batch size"),
    ],
)
def test_contradictions_name_all_the_numbers(given, ranks, sentence):
    with pytest.raises(ConfigError, match=sentence):
        BatchConfig(**given).resolve(ranks)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: BatchConfig(micro_batch=0), "batch.micro_batch is 0"),
        (lambda: DataConfig(workers=-1), "data.workers is -1"),
        (lambda: DataConfig(prefetch=0), "data.prefetch is 0"),
        (lambda: DataConfig(shards=0), "data.shards is 0"),
        (lambda: DataConfig(worker_restarts=-1), "data.worker_restarts is -1"),
        (lambda: DataConfig(transform="flip"), "import path"),
        (lambda: DataConfig(on_device="pixel").open_on_device(), "import path such as"),
        (
            lambda: DataConfig(on_device="pixels", on_device_args={"men": 1}).open_on_device(),
            "does not take",
        ),
        (lambda: DataConfig().open_training(size=1), "data.source is not set"),
    ],
)
def test_impossible_settings_are_refused(build, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build()


@pytest.fixture
def config(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(30))
    np.save(tmp_path / "held_out.npy", np.arange(7))
    return DataConfig(
        source="numpy",
        args={"path": str(tmp_path / "x.npy")},
        evaluation=SourceConfig(source="numpy", args={"path": str(tmp_path / "held_out.npy")}),
        collate="builtins:list",
    )


def test_training_is_endless_and_evaluation_one_pass_in_order(config):
    training = config.open_training(size=8, seed=4)
    assert isinstance(training, LocalBatches)
    assert len([next(training) for _ in range(7)]) == 7 and training.epoch == 2 and training.seed == 4
    evaluation = config.open_evaluation(size=2, rank=1, world_size=2)
    for _ in range(2):
        assert [[int(s["held_out"]) for s in batch] for batch in evaluation] == [[2, 3], [6]]
        evaluation.rewind()
    assert DataConfig(source="numpy").open_evaluation(size=2) is None


def test_the_seed_of_the_data_beats_that_of_the_run_and_a_source_in_hand_the_named_one():
    stream = DataConfig(seed=3).open_training(size=2, seed=4, source=[1, 2, 3])
    assert stream.seed == 3 and stream.num_samples == 3


def test_what_is_only_iterated_gets_the_stream_for_it():
    assert isinstance(DataConfig().open_training(size=2, source=iter([1])), IterableBatches)


def test_the_settings_are_read_from_a_recipe():
    pydantic = pytest.importorskip("pydantic")
    read = pydantic.TypeAdapter(DataConfig).validate_python
    found = read({"source": "text", "args": {"length": 8}, "evaluation": {"source": "text"}, "worker_timeout": 5})
    assert found.evaluation.source == "text" and found.worker_timeout.total_seconds() == 5
    with pytest.raises(pydantic.ValidationError, match="workerz"):
        read({"workerz": 3})


def test_what_is_done_on_the_device_is_a_short_name_a_function_or_a_class_with_args():
    assert DataConfig().open_on_device() is None
    assert isinstance(DataConfig(on_device="pixels", on_device_args={"mean": 0.5}).open_on_device(), Pixels)
    assert DataConfig(on_device="builtins:list").open_on_device() == [], "a class is made"
    assert DataConfig(on_device="builtins:len").open_on_device() is len


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, "it needs one of the two"),
        ({"source": "csv", "fraction": 0.1}, "it needs one of the two"),
        ({"fraction": 1.0}, "lies between 0 and 1"),
        ({"fraction": 0.1, "args": {"path": "x"}}, "for a source of its own"),
    ],
)
def test_an_evaluation_is_a_source_or_a_fraction(values, sentence):
    with pytest.raises(ConfigError, match=sentence):
        SourceConfig(**values)


def test_a_fraction_of_what_is_only_iterated_is_refused():
    config = DataConfig(source="data.test_config:stream", evaluation=SourceConfig(fraction=0.1))
    for opening in (config.open_training, config.open_evaluation):
        with pytest.raises(ConfigError, match="cannot be found in it"):
            opening(size=4)


def stream():
    return iter(range(10))


def test_a_given_source_is_split_as_a_configured_one_is():
    config = DataConfig(evaluation=SourceConfig(fraction=0.25))
    given = list(range(40))
    with config.open_training(size=3, source=given) as training, config.open_evaluation(size=3, training=given) as rest:
        assert (training.num_samples, rest.num_samples) == (30, 10)
