"""Blocks dealt out to several devices compute what one device computes."""

from __future__ import annotations

import pytest
import torch
from models import MODELS
from torch import Tensor, nn

from trainfleet.errors import PlanError
from trainfleet.mesh import Mesh
from trainfleet.parallel import NativeEngine, parallelize, place
from trainfleet.parallel.torch_private import FakeTensorMode
from trainfleet.plan import Plan


class Tied(nn.Module):
    """The head is the embedding, a mask and the first result go past all blocks, and a buffer is used at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(4))
        self.register_buffer("scale", torch.ones(8))
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        first = x = self.embedding(tokens)
        mask = (tokens > 3).unsqueeze(-1)
        for block in self.blocks:
            x = x + mask * block(x)
        return self.head(torch.cat([x, first * self.scale], 0))


TWO = [torch.device("cuda", 0), torch.device("cuda", 1)]


def test_blocks_go_to_devices_in_turn_by_the_size_of_their_parameters() -> None:
    model = Tied()
    homes = place.assignment(model, list(model.blocks), TWO)
    assert [homes[block].index for block in model.blocks] == [0, 1, 1, 1]  # the embedding is as large as a block
    assert homes[model.embedding].index == 0 and homes[model.head].index == 1
    heavy = nn.ModuleList([nn.Linear(4, 4), nn.Linear(40, 40), nn.Linear(4, 4), nn.Linear(40, 40)])
    assert [place.assignment(heavy, list(heavy), TWO)[each].index for each in heavy] == [0, 0, 1, 1]
    heavy = nn.ModuleList([nn.Linear(50, 50), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(40, 40)])
    assert [place.assignment(heavy, list(heavy), TWO)[each].index for each in heavy] == [0, 1, 1, 1]


def test_no_function_gets_tensors_of_two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with torch.no_grad(), FakeTensorMode():  # tensors with devices and without numbers
        model = Tied().requires_grad_(False)
        # Torch cannot move these in place as it moves others.
        made: dict[Tensor, nn.Parameter] = {}
        for module, home in place.assignment(model, list(model.blocks), TWO).items():
            for name, each in module._parameters.items():
                if each is not None:
                    made.setdefault(each, nn.Parameter(each.to(home), requires_grad=False))
                    module._parameters[name] = made[each]
        where = place.place(model, list(model.blocks), ["cuda:0", "cuda:1"])
        assert where["blocks.0.0.weight"] == TWO[0] and where["blocks.3.0.weight"] == TWO[1]
        assert model.head.weight is model.embedding.weight and model.embedding.weight.device == TWO[0]
        output = model(torch.zeros(2, 5, dtype=torch.long))
        assert output.device == TWO[1] and output.shape == (4, 5, 16)
        with pytest.raises(RuntimeError, match="cuda:0 and cuda:1"):
            model.blocks[0](torch.zeros(8)) + model.blocks[3](torch.zeros(8))  # outside of the model's forward


@pytest.mark.parametrize("plan", [{}, {"recompute": "blocks"}, {"activations": "offload"}], ids=str)
def test_training_is_the_same_to_the_bit(plan: dict[str, str]) -> None:
    case, found = MODELS["recurrent"], []
    for devices in ((), ("cpu", "cpu")):
        placed = Plan(devices=devices, **plan)  # type: ignore[arg-type]
        with Mesh.from_env(placed, device="cpu") as mesh:
            model = parallelize(case.build(0), mesh, placed)
            engine = NativeEngine(model, torch.optim.AdamW(model.parameters(), lr=1e-2), case.loss_fn)
            losses = []
            for step in range(2):
                losses.append(engine.forward_backward([case.micro_batch(0, step)]).mean)
                engine.clip(1.0)
                engine.step()
            found.append([torch.tensor(losses), *(parameter.detach() for parameter in model.parameters())])
    assert all(map(torch.equal, *found))


def test_devices_that_are_not_there_and_too_few_blocks_are_refused() -> None:
    model = Tied()
    for names, reason in (
        (("cuda:7", "cpu"), "torch sees . GPU"),
        (("gpu", "cpu"), "'gpu', which is no device"),
        (("meta", "cpu"), "holds no numbers"),
        (("cpu",) * 5, "names 5 devices, but Tied has 4 blocks"),
    ):
        with pytest.raises(PlanError, match=reason):
            place.place(model, list(model.blocks), names)
