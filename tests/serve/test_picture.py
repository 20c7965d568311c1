"""The picture of a confusion matrix is drawn at any number of classes, with counts where they can be read."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="pictures are drawn by matplotlib")
from matplotlib.axes import Axes
from matplotlib.image import imread

from trainfleet.errors import StoreError
from trainfleet.serve.validation import Tally


def validation(num_classes: int):
    draw = np.random.default_rng(0)
    truth = draw.integers(0, num_classes, 4000)
    told = np.where(draw.random(4000) < 0.7, truth, draw.integers(0, num_classes, 4000))
    pairs, counts = np.unique(truth * num_classes + told, return_counts=True)
    tally = Tally()
    tally.add({"rows": np.array(4000), "num_classes": np.array(num_classes), "pairs": pairs, "counts": counts})
    return tally.result([f"class {c}" for c in range(num_classes)])


@pytest.mark.parametrize(("num_classes", "texts"), [(2, 4), (10, 100), (100, 0)])
def test_a_picture_is_drawn(num_classes, texts, tmp_path, monkeypatch):
    written = []
    original = Axes.text
    monkeypatch.setattr(
        Axes, "text", lambda self, *given, **kw: (written.append(given[2]), original(self, *given, **kw))[1]
    )
    found = validation(num_classes)
    path = found.picture(tmp_path / "new folder" / "confusion.png")
    image = imread(path)
    assert min(image.shape[:2]) > 400 and image[..., :3].std() > 0.02
    assert len(written) == texts
    if texts:
        assert written[0] == f"{found.confusion[0, 0]:,}"


def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Cannot write"):
        validation(2).picture(tmp_path / "file" / "confusion.png")
