"""What is exported from any number of ranks and any stage loads into the plain module, equal to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from oracle import named, whole  # noqa: E402
from rank_pool import RankPools  # noqa: E402
from safetensors.torch import load_file, load_model  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from trainfleet.checkpoint import Checkpointer  # noqa: E402
from trainfleet.checkpoint.catalog import read_step  # noqa: E402
from trainfleet.checkpoint.export import safetensors_of  # noqa: E402
from trainfleet.mesh import Mesh  # noqa: E402
from trainfleet.parallel import parallelize  # noqa: E402
from trainfleet.parallel.pieces import ModelState  # noqa: E402
from trainfleet.plan import Plan  # noqa: E402
from trainfleet.store import FileStore  # noqa: E402

ZERO = [Plan(zero=zero) for zero in (0, 1, 2, 3)]
PLANS = {
    1: [Plan(), Plan(zero=3)],
    2: [*ZERO, Plan(zero=3, recompute="blocks", precision="bf16", offload="parameters")],
    4: [Plan(zero=1), Plan(zero=3), Plan(zero=3, dp_replicate=2)],
}


class Model(nn.Module):
    """A tied weight, lengths that no number of ranks divides, a scalar, buffers kept and not, a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(2))
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embed.weight
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Parameter(torch.randn(3, 2), requires_grad=False)
        self.register_buffer("narrow", torch.randn(3).half())
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        x = self.embed(input)
        for block in self.blocks:
            x = x + block(x)
        return self.gain * self.head(self.norm(x))


def train_and_save(plans: list[Plan], folder: str) -> list[dict[str, Tensor]]:
    """Two steps with each plan, saved as step number i of `folder`; what the model is then, gathered by torch."""
    found = []
    for i, plan in enumerate(plans):
        with Mesh.from_env(plan) as mesh:
            torch.manual_seed(i)
            model = parallelize(Model(), mesh, plan)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
            for _ in range(2):
                model(torch.randint(0, 11, (6,))).logsumexp(-1).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            with Checkpointer(FileStore(f"{folder}/{i}"), group=mesh.data_axes) as checkpointer:
                checkpointer.save(i, model=ModelState(model))
            found.append(
                {name.partition(" ")[2]: whole(tensor) for name, tensor in named(model) if name != "buffer scratch"}
            )
    return found


@pytest.mark.parametrize("size", PLANS)
def test_an_export_loads_into_the_plain_module(ranks: RankPools, tmp_path: Path, size: int) -> None:
    expected = ranks(size, train_and_save, PLANS[size], str(tmp_path))[0]
    for i, plan in enumerate(PLANS[size]):
        store = FileStore(tmp_path / str(i))
        _, indexes = read_step(store, None)
        file = tmp_path / f"{i}.safetensors"
        file.write_bytes(b"".join(bytes(chunk) for chunk in safetensors_of(store, indexes)))
        fresh = Model()
        load_model(fresh, file)  # strict, but that it knows that tied tensors are there once
        again = Model()
        absent, surplus = again.load_state_dict(load_file(file), strict=False)  # by hand, tied ones are absent
        assert absent == ["head.weight"] and surplus == []
        for model in (fresh, again):
            loaded: dict[str, Any] = {name.partition(" ")[2]: tensor for name, tensor in named(model)}
            del loaded["scratch"]
            assert loaded.keys() == expected[i].keys()
            unlike = [
                name
                for name, tensor in loaded.items()
                if tensor.dtype != expected[i][name].dtype or not torch.equal(tensor, expected[i][name])
            ]
            assert unlike == [], plan
