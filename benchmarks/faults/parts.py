"""The processes of a run that is made to fail: feeder, relay, trainer; and what they train on."""

from __future__ import annotations

import itertools
import json
import pickle
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

SAMPLES, SIZE, SEED = 240, 8, 5
STEPS_PER_EPOCH = SAMPLES // SIZE
SAVE_EVERY = 5


class Waves:
    """Sample i is a noisy wave whose frequency is its label; making it takes a moment."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        time.sleep(self.seconds)
        label = index % 5
        wave = np.sin(np.arange(32, dtype=np.float32) * (label + 1) / 5)
        return {"index": index, "input": wave, "label": label}


def augment(sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return {**sample, "input": sample["input"] + 0.3 * rng.standard_normal(32, np.float32)}


def stream(seconds: float = 0.0, workers: int = 0) -> Any:
    from trainfleet.data import LocalBatches

    return LocalBatches(Waves(seconds), size=SIZE, seed=SEED, transform=augment, workers=workers)


def feed(address: str | None, via: str | None, secret: bytes | None, keys: str | None, seconds: float) -> None:
    """A feeder, until it is killed."""
    from trainfleet.data.feed import DataService
    from trainfleet.net.credentials import Credentials

    credentials = Credentials.make(folder=Path(keys)) if keys else Credentials(secret=secret)
    DataService(stream(seconds, workers=1), address=address, via=via, credentials=credentials).serve()


def feed_as_peer(address: str, seconds: float) -> None:
    """What is often written by hand: a DataLoader whose batches go, pickled, to whoever has connected."""
    import torch

    host, port = address.split(":")

    def batches() -> Iterator[Any]:
        for epoch in itertools.count():
            order = torch.Generator().manual_seed(SEED + epoch)
            data = Augmented(Waves(seconds))
            yield from torch.utils.data.DataLoader(data, batch_size=SIZE, shuffle=True, generator=order)

    made = batches()
    with socket.create_server((host, int(port))) as server:
        while True:
            trainer, _ = server.accept()
            with trainer, suppress(OSError):
                while True:
                    body = pickle.dumps(next(made))
                    trainer.sendall(len(body).to_bytes(8, "big") + body)


class Augmented:
    """A dataset with the transform inside, as DataLoaders have it."""

    def __init__(self, source: Waves) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return augment(self.source[index], np.random.default_rng([SEED, index]))


class PeerBatches:
    """The other end: connects again when the connection ends, and knows no place to go on at."""

    def __init__(self, address: str) -> None:
        self._host, port = address.split(":")
        self._port = int(port)
        self._file: Any = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        while True:
            try:
                if self._file is None:
                    self._file = socket.create_connection((self._host, self._port), timeout=3).makefile("rb")
                length = int.from_bytes(self._exactly(8), "big")
                return pickle.loads(self._exactly(length))  # our own process, on this host
            except OSError:
                self._file = None
                time.sleep(0.05)

    def _exactly(self, count: int) -> bytes:
        data = bytes(self._file.read(count))
        if len(data) < count:
            raise ConnectionError("ended")
        return data

    def __enter__(self) -> PeerBatches:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def train(folder: str, feeders: list[str] | None, secret: bytes | None, steps: int) -> None:
    """Train to the end, from the newest checkpoint on; every sample of every step is noted in `used.jsonl`."""
    import torch

    from trainfleet import Checkpointer, Mesh, Plan, Trainer, parallelize
    from trainfleet.data.feed import RemoteBatches
    from trainfleet.events import StepEnded
    from trainfleet.net.credentials import Credentials
    from trainfleet.store import open_store

    torch.set_num_threads(1)
    torch.manual_seed(0)
    plan = Plan(zero=0)
    used: list[int] = []
    notes = (Path(folder) / "used.jsonl").open("a")

    def loss(output: Any, batch: Any) -> Any:
        used.extend(batch["index"].tolist())
        return torch.nn.functional.cross_entropy(output, batch["label"])

    class Notes:
        def on_event(self, event: Any) -> None:
            if isinstance(event, StepEnded):
                notes.write(json.dumps({"step": event.step, "used": used, "at": time.time()}) + "\n")
                notes.flush()
                used.clear()

    with Mesh.from_env(plan) as mesh:
        layers = torch.nn.Linear(32, 16), torch.nn.Tanh(), torch.nn.Linear(16, 5)
        model = parallelize(torch.nn.Sequential(*layers), mesh, plan)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if not feeders:
            batches = stream()
        elif feeders[0].startswith("peer "):
            batches = PeerBatches(feeders[0].split()[1])
        else:
            batches = RemoteBatches(feeders, credentials=Credentials(secret=secret))
        with batches, Checkpointer(open_store(f"{folder}/checkpoints"), group=mesh.world) as checkpointer:
            trainer = Trainer(
                model,
                optimizer,
                loss,
                batches,
                mesh=mesh,
                checkpointer=checkpointer,
                save_every=SAVE_EVERY,
                observers=[Notes()],
            )
            trainer.restore()
            trainer.fit(steps=steps)
        torch.save(dict(model.state_dict()), Path(folder) / "weights.pt")
    notes.close()
