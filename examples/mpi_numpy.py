"""A NumPy model under MPI, without torch: `mpiexec -n 4 python examples/mpi_numpy.py --tp 2 --zero 2`."""

import argparse

import numpy as np
from sklearn.datasets import load_digits

from trainfleet import Plan
from trainfleet.mpi import AdamW, Mesh, Trainer, cross_entropy, mlp, world

parser = argparse.ArgumentParser(description=__doc__)
for name in ("tp", "pp", "zero"):
    parser.add_argument(f"--{name}", type=int, default=int(name != "zero"))
parser.add_argument("--steps", type=int, default=60)
options = parser.parse_args()


def batches(rank: int, size: int):
    """Of each 96 images drawn, the share of one rank."""
    images, labels = load_digits(return_X_y=True)
    draw = np.random.default_rng(0)
    while True:
        chosen = draw.choice(len(labels), 96, replace=False)[rank::size]
        yield (images[chosen] / 16).astype(np.float32), labels[chosen]


with world() as group:
    mesh = Mesh(group, Plan(tp=options.tp, pp=options.pp, zero=options.zero))
    data = mesh.data_axes
    model = mlp([64, 128, 128, 10])
    trainer = Trainer(
        model, AdamW(learning_rate=3e-3), cross_entropy, batches(data.rank, data.size), mesh=mesh, micro_batches=4
    )
    losses = trainer.fit(options.steps)
    held = trainer.spread.optimizer.memory_of_ranks()  # of those that share a copy of the model
    if mesh.is_main:
        print(f"{mesh}: loss {losses[0]:.5f} at first, {np.mean(losses[-10:]):.5f} at the end")
        for rank, memory in enumerate(held):
            print(f"shard {rank}: {memory.parameters:,} bytes of parameters, {memory.optimizer_state:,} of state")
