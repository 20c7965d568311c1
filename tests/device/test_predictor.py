"""On a GPU: a Predictor answers as on the CPU, and what it gives lies in the memory of the host."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from serving import linear, stream, summed  # noqa: E402

from trainfleet.serve import Predictor, predict, validate  # noqa: E402

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU to answer on"),
]


def test_a_gpu_answers_as_the_cpu():
    here, there = (Predictor(linear(), loss_fn=summed, device=device) for device in ("cpu", "cuda"))
    assert here.digest == there.digest
    ours, theirs = (validate(predictor, stream(pin=True)) for predictor in (here, there))
    assert (ours.confusion == theirs.confusion).all() and ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    ours, theirs = (predict(predictor, stream(pin=True), top_k=3, probabilities=True) for predictor in (here, there))
    np.testing.assert_allclose(ours.probabilities, theirs.probabilities, rtol=1e-4, atol=1e-6)
    assert (ours.classes == theirs.classes).all()


def test_a_module_on_a_gpu_is_asked_there():
    assert validate(linear().cuda(), stream()).rows == 103
