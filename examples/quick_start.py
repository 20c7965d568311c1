"""One program for a laptop and a cluster: `python quick_start.py`, or `torchrun --nproc-per-node 2 quick_start.py`."""

import torch
from digits import Digits, digit_loss, mlp

from trainfleet import LocalBatches, Mesh, Plan, Trainer, parallelize
from trainfleet.monitor import Console

plan = Plan(zero=2)
mesh = Mesh.from_env(plan)
model = parallelize(mlp(), mesh, plan)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
batches = LocalBatches(Digits(), size=32, rank=mesh.data_axes.rank, world_size=mesh.data_axes.size)
trainer = Trainer(model, optimizer, digit_loss, batches, mesh=mesh, observers=[Console()] if mesh.is_main else [])
print(trainer.fit(steps=200))
mesh.close()
