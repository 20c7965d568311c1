"""Your own callback and metric: an observer hears every event, and can tell the others a number of its own."""

import torch
from digits import Digits, digit_loss, mlp

from trainfleet import Event, LocalBatches, Mesh, Plan, StepEnded, Trainer, parallelize
from trainfleet.events import Tracked
from trainfleet.monitor import Console


class ImagesSeen:
    """Counts the images and tells every 50 steps."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.seen = trainer, 0

    def on_event(self, event: Event) -> None:
        if isinstance(event, StepEnded):
            self.seen += event.samples
            if event.step % 50 == 0:
                self.trainer.observers.emit(Tracked(step=event.step, name="images", value=self.seen))


with Mesh.from_env() as mesh:
    model = parallelize(mlp(), mesh, Plan())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batches = LocalBatches(Digits(), size=32, rank=mesh.data_axes.rank, world_size=mesh.data_axes.size)
    trainer = Trainer(model, optimizer, digit_loss, batches, mesh=mesh, observers=[Console(log_interval=50)])
    trainer.observers.add(ImagesSeen(trainer))
    trainer.fit(steps=100)
