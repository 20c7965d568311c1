"""Your own operator with a twin in plain torch: it trains, compiles and shards like torch's, and is checked by it."""

import torch
from digits import Digits, digit_loss
from torch import Tensor, nn

from trainfleet import LocalBatches, Mesh, Plan, Trainer, parallelize
from trainfleet.kernels import check_kernel, register_kernel


@register_kernel("mine::swiglu")
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """What the operator means. It runs where nothing faster is registered."""
    return gate * torch.sigmoid(gate) * up


@swiglu.on("cpu")  # of a GPU: .on("cuda"), and inside a call of your CUDA, Triton or C++ extension
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate).mul_(up)


@swiglu.gradient  # without it, the gradient of the twin
def _(gradient: Tensor, output: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    share = torch.sigmoid(gate)
    return gradient * up * share * (1 + gate * (1 - share)), gradient * gate * share


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(64, 256), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(swiglu(*self.into(x).chunk(2, dim=-1)))


found = check_kernel(swiglu, torch.randn(33, 20), torch.randn(33, 20))
print(f"{len(found)} tensors agree with the twin, the largest deviation is {max(each.deviation for each in found):.0e}")
plan = Plan(zero=3)
with Mesh.from_env(plan) as mesh:
    model = parallelize(Gated(), mesh, plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batches = LocalBatches(Digits(), size=32, rank=mesh.data_axes.rank, world_size=mesh.data_axes.size)
    print(Trainer(model, optimizer, digit_loss, batches, mesh=mesh).fit(steps=100))
