"""The two sides of a run that is fed: pictures that cost a core to make, and a small net that costs another to train.

`python -m feeds.training ROLE ...` is one side in a process of its own, bound to one core. It says where it is by a
line of JSON; a trainer then answers each line "STEPS" by what it measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from contextlib import ExitStack
from typing import Any, Final

import numpy as np

TRAINER_CORE, FEEDER_CORE = 0, 1
SIZE: Final = 64
SIDE, MARGIN = 64, 8
SAMPLES: Final = 1 << 16
WARM_STEPS: Final = 8
"""Not timed: what lies ready when a block begins is used up."""
AHEAD_BATCHES: Final = 4
"""That may wait at the trainer."""


class Pictures:
    """uint8 pictures of 72 x 72, each from its number."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        side = SIDE + MARGIN
        rows = np.arange(side, dtype=np.float32)
        wave = np.sin(rows[:, None] * (index % 10 + 1) / 12) + np.cos(rows[None, :] / 7)
        picture = (wave * 60 + 128).astype(np.uint8)
        return {"input": np.stack([picture, picture.T, 255 - picture]), "label": index % 10}


def augment(sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """A random part, turned or not, another brightness, and noise."""
    y, x = rng.integers(0, MARGIN, 2)
    part = sample["input"][:, y : y + SIDE, x : x + SIDE]
    if rng.random() < 0.5:
        part = part[:, :, ::-1]
    noisy = part * np.float32(rng.uniform(0.8, 1.2)) + rng.standard_normal(part.shape, np.float32) * 8
    return {**sample, "input": np.clip(noisy, 0, 255).astype(np.uint8)}


def stream() -> Any:
    from trainfleet.data import LocalBatches

    return LocalBatches(Pictures(), size=SIZE, seed=3, transform=augment, workers=1, prefetch=AHEAD_BATCHES)


def feed(address: str) -> None:
    """Until the input ends. Off loopback by TLS, and the token is said."""
    from trainfleet.data.feed import DataService
    from trainfleet.net.address import Address
    from trainfleet.net.credentials import Credentials

    os.sched_setaffinity(0, {FEEDER_CORE})
    place = Address.parse(address)
    credentials = None if place.is_loopback else Credentials.make()
    with DataService(stream(), address=place, credentials=credentials) as service:
        service.open()
        say({"place": str(service.address) if credentials is None else str(service.token([service.address]))})
        sys.stdin.read()


def train(place: str | None) -> None:
    """Steps as they are asked for, over the feed at `place`, or on data of this process and a worker."""
    import torch

    from trainfleet import Mesh, Plan, Trainer, parallelize
    from trainfleet.data.feed import RemoteBatches
    from trainfleet.events import StepEnded

    os.sched_setaffinity(0, {TRAINER_CORE})
    torch.set_num_threads(1)
    torch.manual_seed(0)
    steps: list[tuple[float, float]] = []  # when it ended, and how long it waited for its batch

    class Notes:
        def on_event(self, event: Any) -> None:
            if isinstance(event, StepEnded):
                steps.append((time.perf_counter(), event.data_seconds))

    def loss(output: Any, batch: Any) -> Any:
        return torch.nn.functional.cross_entropy(output, batch["label"])

    with ExitStack() as opened:
        mesh = opened.enter_context(Mesh.from_env(Plan(zero=0)))
        num_bytes = AHEAD_BATCHES * SIZE * 3 * SIDE * SIDE
        batches = stream() if place is None else RemoteBatches([place], buffer_bytes=num_bytes + num_bytes // 4)
        opened.enter_context(batches)
        model = parallelize(net(torch), mesh, Plan(zero=0))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        trainer = Trainer(model, optimizer, loss, batches, mesh=mesh, observers=[Notes()])
        trainer.fit(steps=2)
        for pid in batches.worker_pids if place is None else ():
            os.sched_setaffinity(pid, {FEEDER_CORE})
        say({"ready": True})
        for line in sys.stdin:
            steps.clear()
            before = dict(batches.waits.seconds)
            trainer.fit(steps=trainer.step + WARM_STEPS + int(line))
            timed = steps[WARM_STEPS:]
            seconds = timed[-1][0] - steps[WARM_STEPS - 1][0]
            waited = {cause: now - before[cause] for cause, now in batches.waits.seconds.items()}
            say(
                {
                    "samples_per_second": SIZE * len(timed) / seconds,
                    "idle": sum(waits for _, waits in timed) / seconds,
                    "causes": waited,
                    "weights": digest_of(model),
                }
            )


def net(torch: Any) -> Any:
    nn = torch.nn

    class Scaled(nn.Module):  # type: ignore[misc]
        """uint8 travels; the trainer makes numbers of it."""

        def forward(self, pixels: Any) -> Any:
            return pixels.float().div(255)

    return nn.Sequential(
        Scaled(),
        nn.Conv2d(3, 32, 5, stride=3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
    )


def digest_of(model: Any) -> str:
    hashed = hashlib.blake2b(digest_size=8)
    for name, tensor in model.state_dict().items():
        hashed.update(name.encode() + tensor.numpy().tobytes())
    return hashed.hexdigest()


def say(words: dict[str, Any]) -> None:
    print(json.dumps(words), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=("feed", "train"))
    parser.add_argument("place", nargs="?")
    given = parser.parse_args()
    feed(given.place) if given.role == "feed" else train(given.place)
