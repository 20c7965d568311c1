"""Checkpoints in a loop of your own, without torch: anything with state_dict and load_state_dict is saved."""

from typing import Any

import numpy as np

from trainfleet import Checkpointer
from trainfleet.checkpoint import Retention
from trainfleet.store import FileStore


class Walk:
    """A random walk: an array, a counter and a generator, all of which a resume needs."""

    def __init__(self) -> None:
        self.place, self.steps, self.draw = np.zeros(3), 0, np.random.default_rng(0)

    def step(self) -> None:
        self.place += self.draw.normal(size=3)
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        generator = self.draw.bit_generator.state["state"]  # integers of 128 bits: as text
        return {"place": self.place, "steps": self.steps, "generator": {k: str(v) for k, v in generator.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place, self.steps = state["place"], state["steps"]
        generator = {key: int(value) for key, value in state["generator"].items()}
        self.draw.bit_generator.state = {**self.draw.bit_generator.state, "state": generator}


def walk(until: int) -> Walk:
    """From the newest checkpoint on, saving every tenth step and keeping the one farthest from home."""
    walker = Walk()
    with Checkpointer(FileStore("walk"), retention=Retention(last=2, best=1, metric="far", mode="max")) as checkpointer:
        print("begins at step", checkpointer.restore(walk=walker) or 0)
        while walker.steps < until:
            walker.step()
            if walker.steps % 10 == 0:
                checkpointer.save(walker.steps, metrics={"far": float(np.linalg.norm(walker.place))}, walk=walker)
    print("checkpoints of steps", checkpointer.steps())
    return walker


if __name__ == "__main__":
    walk(until=50)
    walk(until=100)
