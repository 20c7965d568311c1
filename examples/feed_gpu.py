"""The side that trains: its batches are made where `feed_cpu.py` runs, and are those of training there."""

import sys

import torch
from digits import digit_loss, mlp

from trainfleet import Mesh, Plan, RemoteBatches, Trainer, parallelize
from trainfleet.monitor import Console

plan = Plan()
mesh = Mesh.from_env(plan)
model = parallelize(mlp(), mesh, plan)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
share = {"rank": mesh.data_axes.rank, "world_size": mesh.data_axes.size}
batches = RemoteBatches(sys.argv[1:], **share)
held_out = RemoteBatches(sys.argv[1:], stream="evaluation", **share)


def one_pass() -> RemoteBatches:
    held_out.rewind()
    return held_out


observers = [Console()] if mesh.is_main else []
trainer = Trainer(model, optimizer, digit_loss, batches, mesh=mesh, evaluation=one_pass, observers=observers)
print(trainer.fit(steps=200))
for stream in (batches, held_out):
    stream.close()
mesh.close()
