"""Train one plain PyTorch model on whatever machines there are, and trust the result.

The names below are loaded on first use, so that `import trainfleet` takes milliseconds and needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainfleet.checkpoint import Checkpointer
    from trainfleet.data import LocalBatches, Sampler
    from trainfleet.data.feed import DataService, RemoteBatches
    from trainfleet.errors import TrainfleetError
    from trainfleet.events import Evaluated, Event, Observer, StepEnded
    from trainfleet.loss import LossSum
    from trainfleet.mesh import Mesh
    from trainfleet.parallel import Engine, NativeEngine, parallelize
    from trainfleet.plan import Plan
    from trainfleet.serve import ModelService, RemoteModel, predict, validate
    from trainfleet.state import ShardedArray, Stateful
    from trainfleet.store import open_store
    from trainfleet.tracks import track
    from trainfleet.training.proof.verify import verify
    from trainfleet.training.ranks.launch import launch
    from trainfleet.training.train import train
    from trainfleet.training.trainer import Trainer

_HOMES = {
    "trainfleet.checkpoint": ("Checkpointer",),
    "trainfleet.data": ("LocalBatches", "Sampler"),
    "trainfleet.data.feed": ("DataService", "RemoteBatches"),
    "trainfleet.errors": ("TrainfleetError",),
    "trainfleet.events": ("Evaluated", "Event", "Observer", "StepEnded"),
    "trainfleet.loss": ("LossSum",),
    "trainfleet.mesh": ("Mesh",),
    "trainfleet.parallel": ("Engine", "NativeEngine", "parallelize"),
    "trainfleet.plan": ("Plan",),
    "trainfleet.serve": ("ModelService", "RemoteModel", "predict", "validate"),
    "trainfleet.state": ("ShardedArray", "Stateful"),
    "trainfleet.store": ("open_store",),
    "trainfleet.tracks": ("track",),
    "trainfleet.training.ranks.launch": ("launch",),
    "trainfleet.training.train": ("train",),
    "trainfleet.training.trainer": ("Trainer",),
    "trainfleet.training.proof.verify": ("verify",),
}

__all__ = [
    "Checkpointer",
    "DataService",
    "Engine",
    "Evaluated",
    "Event",
    "LocalBatches",
    "LossSum",
    "Mesh",
    "ModelService",
    "NativeEngine",
    "Observer",
    "Plan",
    "RemoteBatches",
    "RemoteModel",
    "Sampler",
    "ShardedArray",
    "Stateful",
    "StepEnded",
    "Trainer",
    "TrainfleetError",
    "launch",
    "open_store",
    "parallelize",
    "predict",
    "track",
    "train",
    "validate",
    "verify",
]


def __getattr__(name: str) -> Any:
    import importlib

    if name == "__version__":
        from importlib.metadata import version

        return version("trainfleet")
    for home, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(importlib.import_module(home), name)
            return value
    raise AttributeError(f"module 'trainfleet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
