"""Kill a run in the middle and start it again: it ends as the run that was never killed, to the bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from digits import Digits, mlp

from trainfleet import train
from trainfleet.events import Event, StepEnded
from trainfleet.monitor import read_metrics

CONFIG = {"batch_size": 32, "learning_rate": 1e-3, "steps": 60, "save_interval": 10, "auto_resume": True}


class KilledAt:
    """An observer that ends its own process after a step, as a power cut would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_event(self, event: Event) -> None:
        if isinstance(event, StepEnded) and event.step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder: str, killed_at: int = 0) -> None:
    train(mlp(), Digits(), {**CONFIG, "save_dir": folder, "monitor.console": False}, observers=[KilledAt(killed_at)])


def losses(folder: str) -> list[float]:
    return [row["loss"] for row in read_metrics(Path(folder) / "metrics.jsonl")]


if __name__ == "__main__":
    if len(sys.argv) == 3:
        run(sys.argv[1], killed_at=int(sys.argv[2]))
    else:
        run("runs/never_killed")
        for step in (25, 43):  # kills that leave 5 and 3 steps to be taken again
            ended = subprocess.run([sys.executable, __file__, "runs/killed", str(step)], check=False)
            print(f"killed at step {step} by {signal.Signals(-ended.returncode).name}")
        run("runs/killed")
        same = losses("runs/killed") == losses("runs/never_killed")
        print(f"{len(losses('runs/killed'))} losses, equal to the bit: {same}")
