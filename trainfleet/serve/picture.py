"""The confusion matrix as a picture: each row shows where the labels of one class went."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trainfleet.deps import require
from trainfleet.store.file import write_file

if TYPE_CHECKING:
    from trainfleet.serve.validation import Validation

INK, GRAY = "#333333", "#8a8a8a"
_COUNTED = 15
"""Up to so many classes the cells hold their counts."""
_NAMED = 60
"""Up to so many classes each has its name on the axes."""


def draw_confusion(validation: Validation, path: Path) -> Path:
    """A PNG of `validation.confusion` at `path`, wholly or not at all.

    Colours are shares of a row: 1 on the diagonal is a class that is always found. StoreError where it cannot be
    written.
    """
    require("matplotlib", "monitor", purpose="The picture of the confusion matrix")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = validation.confusion
    assert counts is not None
    num_classes = len(counts)
    shares = np.divide(
        counts, counts.sum(1, keepdims=True), out=np.zeros(counts.shape), where=counts.sum(1)[:, None] > 0
    )
    grown = 2.4 + 0.5 * min(num_classes, _COUNTED) + 0.13 * max(0, num_classes - _COUNTED)
    side = 9.0 if num_classes > _NAMED else max(4.2, grown)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("share of the class's labels", fontsize=8, color=GRAY)
    bar.ax.tick_params(labelsize=7, colors=GRAY)
    if num_classes <= _COUNTED:
        for truth, predicted in np.ndindex(counts.shape):
            if counts[truth, predicted]:
                ink = "white" if shares[truth, predicted] > 0.5 else INK
                size = 9 if counts.max() < 10_000 else 7
                axes.text(
                    predicted, truth, f"{counts[truth, predicted]:,}", ha="center", va="center", color=ink, size=size
                )
    if num_classes <= _NAMED:
        names = [name if len(name) <= 18 else name[:17] + "…" for name in validation.names]
        is_turned = num_classes > 12 or max(map(len, names)) > 4
        size = 9 if num_classes <= _COUNTED else 6
        axes.set_xticks(range(num_classes), names, rotation=90 if is_turned else 0, fontsize=size, color=INK)
        axes.set_yticks(range(num_classes), names, fontsize=size, color=INK)
    else:
        axes.tick_params(labelsize=8, colors=INK)
    axes.set_xlabel("predicted", fontsize=9, color=INK)
    axes.set_ylabel("truth", fontsize=9, color=INK)
    loss = "" if validation.loss is None else f"   loss {validation.loss:.4f}"
    title = f"accuracy {validation.accuracy or 0:.4f}{loss}   of {validation.counted:,}"
    axes.set_title(title, loc="left", fontsize=9, color=INK)
    for edge in axes.spines.values():
        edge.set_visible(False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=130)
    write_file(path, drawn.getvalue())
    return path
