"""Whichever way a model is meant, something answers for it."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="models are torch's")
from serving import linear  # noqa: E402

from trainfleet.errors import ConfigError  # noqa: E402
from trainfleet.serve.answering import answering  # noqa: E402
from trainfleet.serve.predictor import Predictor  # noqa: E402


def test_what_answers_is_taken_as_it_is_and_its_weights_are_not_read():
    class Model:
        @property
        def digest(self):
            raise AssertionError("the digest costs a pass over all weights")

        def answers(self, batches, terms):
            return iter(())

    model = Model()
    with answering(model) as found:
        assert found is model


def test_a_module_answers_and_goes_on_training_even_after_an_error():
    model = linear().train()
    with pytest.raises(KeyError), answering(model) as found:
        assert isinstance(found, Predictor) and not model[1].training
        raise KeyError
    assert model[1].training


@pytest.mark.parametrize("meant", [3, [], [3], None])
def test_what_cannot_answer_is_refused(meant):
    with pytest.raises(ConfigError, match="cannot answer"), answering(meant):
        pass
