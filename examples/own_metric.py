"""Numbers of your own: told where they arise, reduced over batches and ranks, of training and of evaluation."""

import torch
from digits import Digits, digit_loss, mlp

from trainfleet import LocalBatches, LossSum, Mesh, Plan, Trainer, parallelize, track
from trainfleet.monitor import Console


def loss_and_accuracy(output: torch.Tensor, batch: dict[str, torch.Tensor]) -> LossSum:
    right = output.argmax(-1) == batch["target"]
    track("accuracy", right.float().mean(), weight=len(right))
    return digit_loss(output, batch)


with Mesh.from_env() as mesh:
    model = parallelize(mlp(), mesh, Plan())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    share = {"rank": mesh.data_axes.rank, "world_size": mesh.data_axes.size}
    trainer = Trainer(
        model,
        optimizer,
        loss_and_accuracy,
        LocalBatches(Digits(), size=32, **share),
        mesh=mesh,
        evaluation=lambda: LocalBatches(Digits(held_out=True), size=32, epochs=1, short="pad", **share),
        observers=[Console(log_interval=50)] if mesh.is_main else [],
        report_every=50,
    )
    trainer.fit(steps=100)
