"""The side that trains on the images of `images_cpu.py`: they come as uint8, and become floats on the device."""

import sys

import torch
from digits import digit_loss
from torch import nn

from trainfleet import Mesh, Plan, RemoteBatches, Trainer, parallelize
from trainfleet.data.pixels import Pixels
from trainfleet.monitor import Console
from trainfleet.training.recipe import TrainConfig

with Mesh.from_env(Plan()) as mesh:
    share = {"rank": mesh.data_axes.rank, "world_size": mesh.data_axes.size}
    batches = RemoteBatches(sys.argv[1:], **share)
    held_out = RemoteBatches(sys.argv[1:], stream="evaluation", **share)

    def one_pass() -> RemoteBatches:
        held_out.rewind()
        return held_out

    torch.manual_seed(0)
    convolutions = [nn.Conv2d(1, 16, 3, stride=2), nn.GELU(), nn.Conv2d(16, 32, 3, stride=2), nn.GELU()]
    model = parallelize(nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(800, 10)), mesh, Plan())
    trainer = Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=2e-3),
        digit_loss,
        batches,
        mesh=mesh,
        prepare=Pixels(mean=0.3, std=0.4),
        evaluation=one_pass,
        config=TrainConfig(evaluate_every="epoch", early_stopping=3),
        observers=[Console(log_interval=50)] if mesh.is_main else [],
    )
    print(trainer.fit(steps=150))
    for stream in (batches, held_out):
        stream.close()
