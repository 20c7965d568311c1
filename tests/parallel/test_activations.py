"""What blocks keep for backward rests in CPU memory, and comes back as it was."""

from __future__ import annotations

import pytest
import torch
from models import MODELS
from rank_pool import RankPools
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from trainfleet.mesh import Mesh
from trainfleet.parallel import NativeEngine, parallelize
from trainfleet.parallel.activations import offload_activations
from trainfleet.plan import Plan

CASE = MODELS["transformer"]


class Block(nn.Module):
    def __init__(self, *, spoils: bool = False) -> None:
        super().__init__()
        self.linear, self.back = nn.Linear(64, 128), nn.Linear(128, 64)
        self.dropout = nn.Dropout(0.2)
        self.spoils = spoils

    def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:
        wide = torch.tanh(self.linear(x))
        narrow, rest = self.back(wide).chunk(2, dim=-1)
        x = x + mask * self.dropout(torch.cat([narrow.exp(), rest.sigmoid()], -1))
        if self.spoils:
            with torch.no_grad():
                wide.add_(1)
        return x


class Model(nn.Module):
    def __init__(self, *, spoils: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(spoils=spoils) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(64, 64)
        for block in self.blocks:
            x = block(x, mask=mask)
        return x


def model_of(*, offloading: bool, spoils: bool = False) -> Model:
    torch.manual_seed(0)
    model = Model(spoils=spoils)
    if offloading:
        offload_activations(list(model.blocks), "cpu")
    return model


def seen_outside(model: Model, x: Tensor) -> tuple[Tensor, int]:
    """The output, and the bytes that are kept for backward where blocks have taken nothing away."""
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    return output, sum(held.values())


def test_what_blocks_keep_leaves_the_device_and_gradients_are_the_same() -> None:
    found = []
    for offloading in (False, True):
        model = model_of(offloading=offloading)
        torch.manual_seed(1)
        x = torch.randn(64, 64, requires_grad=True)
        output, kept = seen_outside(model, x)
        assert (kept == 0) == offloading
        output.square().sum().backward(retain_graph=True)
        output.sum().backward()
        found.append([x.grad, *(parameter.grad for parameter in model.parameters())])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("offloading", [False, True])
def test_memory_of_a_block_is_free_from_the_next_one_on(offloading: bool) -> None:
    model = model_of(offloading=offloading)
    wide: list[StorageWeakRef] = []
    model.blocks[0].back.register_forward_pre_hook(
        lambda module, args: wide.append(StorageWeakRef(args[0].untyped_storage()))
    )
    output = model(torch.randn(64, 64, requires_grad=True))
    assert wide[0].expired() == offloading
    output.sum().backward()
    assert wide[0].expired()


def test_what_is_changed_in_place_after_it_was_kept_is_an_error_as_it_is_elsewhere() -> None:
    for offloading in (False, True):
        output = model_of(offloading=offloading, spoils=True)(torch.randn(64, 64, requires_grad=True))
        with pytest.raises(RuntimeError, match="in place after it was kept" if offloading else "inplace operation"):
            output.sum().backward()


def test_on_the_cpu_it_is_said_that_nothing_is_saved(caplog: pytest.LogCaptureFixture) -> None:
    model_of(offloading=True)
    assert "which saves nothing" in caplog.text


def trained(plan: Plan) -> list[Tensor]:
    with Mesh.from_env(plan, device="cpu") as mesh:
        model = parallelize(CASE.build(0, dropout=0.2, width=64), mesh, plan)
        engine = NativeEngine(model, torch.optim.AdamW(model.parameters(), lr=1e-2), CASE.loss_fn)
        for step in range(2):
            numbers = [2 * (2 * step + i) + mesh.data_axes.rank for i in range(2)]
            engine.forward_backward([CASE.micro_batch(0, number) for number in numbers])
            engine.clip(1.0)
            engine.step()
        full = [getattr(parameter, "full_tensor", lambda p=parameter: p)() for parameter in model.parameters()]
        return [parameter.detach().clone() for parameter in full]


@pytest.mark.parametrize("recompute", ["none", "blocks"])
def test_training_is_the_same_to_the_bit(recompute: str) -> None:
    plan = {"recompute": recompute, "precision": "bf16"}
    assert all(map(torch.equal, trained(Plan(**plan)), trained(Plan(**plan, activations="offload"))))  # type: ignore[arg-type]


@pytest.mark.parametrize("plan", [{"zero": 3}, {"zero": 3, "recompute": "blocks"}, {"tp": 2}, {"cp": 2}], ids=str)
def test_spread_models_are_the_same_to_the_bit(ranks: RankPools, plan: dict[str, int]) -> None:
    kept, offloaded = (ranks(2, trained, Plan(**plan, activations=where))[0] for where in ("keep", "offload"))  # type: ignore[arg-type]
    assert all(map(torch.equal, kept, offloaded))
