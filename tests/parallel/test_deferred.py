"""A deferred model is, bit by bit, the model that plain construction makes; and costs a host no more than it keeps."""

from __future__ import annotations

import copy
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from trainfleet.errors import PlanError
from trainfleet.parallel.deferred import deferred, is_deferred, materialize

init = nn.init


class Everything(nn.Module):
    """What constructors do: ties, tables, scalars, views, copies, forks, generators, attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8, padding_idx=0)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.gate = nn.Parameter(torch.zeros(()))
        self.register_buffer("mask", torch.tril(torch.ones(5, 5)).view(1, 1, 5, 5))
        self.register_buffer("positions", torch.arange(7).expand((1, -1)))
        angles = torch.outer(torch.arange(6).float(), 1.0 / 10_000 ** (torch.arange(0, 8, 2).float() / 8))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin(), persistent=False)
        table = torch.zeros(6, 8)
        table[:, 0::2], table[:, 1::2] = torch.sin(angles), torch.cos(angles)
        self.table = nn.Parameter(table, requires_grad=False)
        self.rotation = torch.polar(torch.ones_like(angles), angles)  # a plain attribute
        self.nested = [torch.ones(2) * 3, {"noise": torch.randn(3)}]
        self.rates = [rate.item() for rate in torch.linspace(0, 0.1, 4)] + torch.linspace(0, 1, 3).tolist()
        self.narrow = nn.Linear(4, 4).to(torch.bfloat16)
        self.own = nn.Parameter(torch.randn(4, generator=torch.Generator().manual_seed(9)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(77)
            self.forked = nn.Parameter(torch.randn(3))
        self.after = nn.Parameter(torch.randn(3))
        self.shuffled = nn.Parameter(torch.randperm(10).float())
        self.drawn = nn.Parameter(torch.bernoulli(torch.full((5,), 0.5)))
        with torch.no_grad():
            self.after.mul_(2).add_(self.forked)
            self.blocks[1].weight.copy_(self.blocks[0].weight.t())
        self.blocks[2] = copy.deepcopy(self.blocks[1])
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear) and module.bias is not None:
            init.normal_(module.weight, std=0.02)
            init.zeros_(module.bias)


def initialised(function: Callable[[Tensor], Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layer = nn.Linear(6, 9)
        function(layer.weight)
        return layer

    return build


CONSTRUCTORS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(5, 7),
    "bilinear": lambda: nn.Bilinear(3, 4, 5),
    "conv": lambda: nn.Conv2d(3, 8, 3),
    "transposed conv": lambda: nn.ConvTranspose1d(3, 8, 3),
    "embedding": lambda: nn.Embedding(10, 4, padding_idx=1),
    "norms": lambda: nn.Sequential(nn.LayerNorm(4), nn.BatchNorm1d(4), nn.GroupNorm(2, 4), nn.RMSNorm(4)),
    "lstm": lambda: nn.LSTM(4, 5, 2, bidirectional=True),
    "attention": lambda: nn.MultiheadAttention(8, 2, kdim=4, add_bias_kv=True),
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 3),
    "transformer": lambda: nn.Transformer(8, 2, 2, 2, 16),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 7)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(5, 7)),
    "orthogonal map": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(5, 7)),
    "float64": lambda: nn.Linear(5, 7).double(),
    "everything": Everything,
    "orthogonal_": initialised(init.orthogonal_),
    "orthogonal_ of a part": initialised(lambda weight: init.orthogonal_(weight.data[:3], gain=2)),
    "trunc_normal_ that rejects few": initialised(init.trunc_normal_),
    "trunc_normal_ that rejects most": initialised(lambda weight: init.trunc_normal_(weight, a=1, b=2)),
    "trunc_normal_ by erfinv_": initialised(lambda weight: weight.data.uniform_(-0.9, 0.9).erfinv_().mul_(0.02)),
    "xavier_normal_": initialised(init.xavier_normal_),
    "kaiming_uniform_": initialised(init.kaiming_uniform_),
    "sparse_": initialised(lambda weight: init.sparse_(weight, 0.3)),
    "eye_": initialised(init.eye_),
    "dirac_": initialised(lambda weight: init.dirac_(weight.data.view(9, 3, 2))),
    "of numpy": initialised(lambda weight: weight.data.copy_(torch.from_numpy(weight.detach().new_ones(9, 6).numpy()))),
}


def assert_equal_models(plain: nn.Module, other: nn.Module) -> None:
    theirs = [*other.named_parameters(remove_duplicate=False), *other.named_buffers(remove_duplicate=False)]
    ours = [*plain.named_parameters(remove_duplicate=False), *plain.named_buffers(remove_duplicate=False)]
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    for (name, expected), (_, tensor) in zip(ours, theirs, strict=True):
        assert type(tensor) is type(expected), name
        assert (tensor.dtype, tensor.requires_grad) == (expected.dtype, expected.requires_grad), name
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_a_deferred_model_is_the_plain_one_bit_by_bit(name: str) -> None:
    torch.manual_seed(3)
    plain, next_number = CONSTRUCTORS[name](), torch.rand(1)
    torch.manual_seed(3)
    model = deferred(CONSTRUCTORS[name])
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert materialize(model, "cpu") is model
    assert_equal_models(plain, model)
    assert torch.rand(1) == next_number  # the generator is where plain construction leaves it
    assert not is_deferred(model)


def test_plain_attributes_and_ties_come_back() -> None:
    torch.manual_seed(1)
    plain = Everything()
    model = deferred(Everything)
    assert model.rotation.is_meta
    materialize(model, "cpu", seed=1)
    assert model.head.weight is model.embedding.weight
    assert model.rates == plain.rates
    assert torch.equal(model.rotation, plain.rotation)
    assert torch.equal(model.nested[0], plain.nested[0])
    assert torch.equal(model.nested[1]["noise"], plain.nested[1]["noise"])


def test_a_seed_replaces_that_of_the_moment() -> None:
    model = materialize(deferred(Everything), "cpu", seed=5)
    torch.manual_seed(5)
    assert_equal_models(Everything(), model)


def test_numbers_drawn_in_between_change_nothing_and_are_not_disturbed() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(3, 3)
    torch.manual_seed(0)
    model = deferred(lambda: nn.Linear(3, 3))
    torch.manual_seed(42)
    torch.rand(3)
    before = torch.get_rng_state()
    materialize(model, "cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert_equal_models(plain, model)


def test_parts_deferred_one_after_the_other_equal_one_construction() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    torch.manual_seed(0)
    model = nn.Sequential(deferred(lambda: nn.Linear(3, 3)), deferred(lambda: nn.Linear(3, 3)))
    assert_equal_models(plain, materialize(model, "cpu"))


def test_a_copy_of_a_deferred_model_can_be_materialised() -> None:
    model = deferred(Everything)
    twin = copy.deepcopy(model)
    assert_equal_models(materialize(model, "cpu", seed=0), materialize(twin, "cpu", seed=0))


def test_tensors_that_were_real_before_stay() -> None:
    given = torch.arange(3.0)

    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.given = nn.Parameter(given)
            self.made = nn.Parameter(given * 2 + torch.ones(3))
            assert given.sum().item() == 3  # real values may be read

    model = deferred(Given)
    assert torch.equal(model.given, given)
    materialize(model, "cpu")
    assert model.given.data_ptr() == given.data_ptr()
    assert model.made.tolist() == [1.0, 3.0, 5.0]


def test_a_module_that_recurs_runs_after_materialising() -> None:
    torch.manual_seed(0)
    plain = nn.LSTM(4, 5, 2)
    model = materialize(deferred(lambda: nn.LSTM(4, 5, 2)), "cpu", seed=0)
    inputs = torch.ones(3, 2, 4)
    assert torch.equal(plain(inputs)[0], model(inputs)[0])


def test_what_is_changed_on_the_meta_device_is_kept() -> None:
    model = deferred(lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    model[0].requires_grad_(False)
    model[1] = nn.Identity()
    model.bfloat16()
    torch.manual_seed(0)
    plain = nn.Linear(3, 3).bfloat16()
    materialize(model, "cpu", seed=0)
    assert torch.equal(model[0].weight, plain.weight) and not model[0].weight.requires_grad


def test_memory_never_written_is_zero() -> None:
    class Forgotten(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(1000))

    assert not materialize(deferred(Forgotten), "cpu").weight.any()


def test_a_source_changed_before_materialising_is_refused() -> None:
    source = torch.ones(9, 6)
    model = deferred(initialised(lambda weight: weight.data.copy_(source)))
    source.zero_()
    with pytest.raises(PlanError, match="has been changed since"):
        materialize(model, "cpu")


def test_meta_tensors_we_did_not_see_made_are_named() -> None:
    model = deferred(lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")))
    with pytest.raises(PlanError, match=r"^1\.weight is on the meta device"):
        materialize(model, "cpu")


def test_a_model_that_was_not_deferred_is_refused() -> None:
    with pytest.raises(PlanError, match="nothing to materialise"):
        materialize(nn.Linear(2, 2), "cpu")


def test_nothing_is_left_of_the_recording() -> None:
    model = deferred(Everything)
    recording = weakref.ref(model.__dict__["_trainfleet_deferred"].recording)
    materialize(model, "cpu")
    assert recording() is None
    assert init._no_grad_trunc_normal_.__module__ == "torch.nn.init"


class Sharded(nn.Module):
    """Rows that do not divide, fewer rows than ranks, tied and recurrent parameters, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(6, 2, 5) for _ in range(2))
        self.thin = nn.Linear(6, 1)
        self.recurrent = nn.LSTM(6, 5)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.tensor(2.0))
        init.trunc_normal_(self.thin.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(torch.sigmoid(self.thin(hidden)) * hidden) * self.scale + self.recurrent(hidden)[0].sum()


def sharded_differences(replicas: int, shards: int) -> list[str]:
    torch.manual_seed(4)
    plain = Sharded()
    next_number = torch.rand(1)
    torch.manual_seed(4)
    model = deferred(Sharded)
    mesh = init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replicate", "shard"))
    mesh = mesh if replicas > 1 else mesh["shard"]
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params={model.scale})
    materialize(model, "cpu")
    assert torch.rand(1) == next_number
    assert model.head.weight is model.embedding.weight
    found = dict(model.named_parameters())
    differences = []
    for name, expected in plain.named_parameters():
        whole = found[name].full_tensor() if name != "scale" else found[name]
        if not torch.equal(whole, expected):
            differences.append(name)
    # And it runs: FSDP2 has noticed its new memory.
    tokens = torch.arange(7).view(1, 7)
    if not torch.allclose(model.eval()(tokens), plain.eval()(tokens), atol=1e-6):
        differences.append("output")
    return differences


@pytest.mark.parametrize(("replicas", "shards"), [(1, 2), (1, 4), (2, 2)])
def test_shards_of_a_deferred_model_are_those_of_the_plain_one(ranks: Any, replicas: int, shards: int) -> None:
    assert ranks(replicas * shards, sharded_differences, replicas, shards) == [[]] * (replicas * shards)


PEAK = """
import torch
from pathlib import Path
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from trainfleet.parallel.deferred import deferred, materialize

class Big(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(24))  # 4 MiB each
        self.apply(lambda m: nn.init.trunc_normal_(m.weight, std=0.02) if isinstance(m, nn.Linear) else None)

def memory(key): return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) / 1024
torch.set_num_threads(1)
torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=16)
materialize(fully_shard(deferred(lambda: nn.Linear(8, 8))), "cpu", seed=0)  # what is loaded on first use
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = memory("VmRSS")
materialize(fully_shard(deferred(Big)), "cpu", seed=0)
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_a_host_holds_the_shards_and_a_few_tensors() -> None:
    """96 MiB over 16 ranks: 6 MiB stay, and `trunc_normal_` needs a few times the largest tensor of 4 MiB."""
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, cwd=root, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 30
