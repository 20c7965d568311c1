"""Your own loop, without a Trainer: the parts work alone. Runs under python and torchrun alike."""

import torch
from digits import Digits, digit_loss, mlp

from trainfleet import LocalBatches, Mesh, Plan, parallelize
from trainfleet.parallel import accumulating

plan = Plan(zero=3)
with Mesh.from_env(plan) as mesh:
    model = parallelize(mlp(), mesh, plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = LocalBatches(Digits(), size=32, rank=mesh.data_axes.rank, world_size=mesh.data_axes.size)
    for _ in range(100):
        with accumulating(model):  # adds to the gradients; the next backward exchanges them
            first = next(batches)
            (digit_loss(model(first["input"]), first).mean_tensor / 2).backward()
        second = next(batches)
        loss = digit_loss(model(second["input"]), second).mean_tensor / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if mesh.is_main:
        print(f"loss {2 * loss.item():.3f} after 100 steps on {mesh.world_size} processes")
