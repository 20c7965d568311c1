"""ZeRO on two processes of this machine: the bytes that the first of them holds, stage by stage."""

import torch
from digits import Digits, digit_loss, mlp

from trainfleet import LocalBatches, Mesh, NativeEngine, Plan, launch, parallelize
from trainfleet.parallel.out_of_memory import held_bytes


def bytes_held(zero: int) -> dict[str, int]:
    with Mesh.from_env(plan := Plan(zero=zero)) as mesh:
        model = parallelize(mlp(), mesh, plan)
        engine = NativeEngine(model, torch.optim.AdamW(model.parameters()), digit_loss)
        batches = LocalBatches(Digits(), size=8, rank=mesh.data_axes.rank, world_size=mesh.data_axes.size)
        engine.forward_backward([next(batches)])
        gradients = held_bytes(model, engine.optimizer, mesh.device)["gradients"]
        engine.step()
        return {**held_bytes(model, engine.optimizer, mesh.device), "gradients": gradients}


def every_stage() -> list[dict[str, int]]:
    return [bytes_held(zero) for zero in range(4)]


if __name__ == "__main__":
    for zero, held in enumerate(launch(every_stage, nproc=2)[0]):
        print(f"zero={zero}", held)
