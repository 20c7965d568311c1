"""An Answering and batches without torch: for children that are forked and killed."""

from __future__ import annotations

from typing import Any

import numpy as np

from trainfleet.data import LocalBatches


class Points:
    """Samples of 5 numbers, which are the scores of as many classes; `read` notes who was asked for."""

    def __init__(self, count: int = 103, seed: int = 3) -> None:
        self.inputs = np.random.default_rng(seed).normal(size=(count, 5)).astype(np.float32)
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.read.append(index)
        return {"input": self.inputs[index]}


def numpy_stream(count: int = 103, seed: int = 3, **settings: Any) -> LocalBatches:
    return LocalBatches(Points(count, seed), size=8, shuffle=False, short="keep", collate="numpy", **settings)


class Scorer:
    """Softmax of the inputs; or the inputs' sum in any shape."""

    def __init__(self, digest: str = "1", values: tuple[int, ...] | None = None) -> None:
        self.digest, self.values, self.answered = digest, values, 0

    def answers(self, batches, terms):
        for batch in batches:
            inputs = np.asarray(batch["input"])
            rows = len(inputs)
            self.answered += 1
            if self.values is not None:
                scale = np.arange(1, 1 + int(np.prod(self.values)), dtype=np.float32)
                values = (inputs.sum(1)[:, None] * scale).reshape(rows, *self.values)
                yield {"rows": np.array(rows), "kept": np.arange(rows, dtype=np.int32), "values": values}
                continue
            exponents = np.exp(inputs)
            shares = exponents / exponents.sum(1, keepdims=True)
            order = np.argsort(-shares, 1, kind="stable")[:, : terms.top_k]
            best = np.take_along_axis(shares, order, 1)
            kept = np.flatnonzero(best[:, 0] >= terms.confidence) if terms.confidence else np.arange(rows)
            found = {
                "rows": np.array(rows),
                "num_classes": np.array(5),
                "kept": kept.astype(np.int32),
                "classes": order[kept].astype(np.int32),
                "confidences": best[kept],
            }
            yield found | ({"probabilities": shares[kept]} if terms.probabilities else {})
