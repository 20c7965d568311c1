"""Batch normalisation on several ranks is that of one process on the batches of all of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainfleet.comm.torch_group import TorchGroup
from trainfleet.errors import PlanError
from trainfleet.parallel.batch_stats import SyncedBatchNorm, sync_batch_stats

SHAPES = {nn.BatchNorm1d: (5, 3), nn.BatchNorm2d: (5, 3, 4, 2), nn.BatchNorm3d: (5, 3, 2, 3, 2)}
CASES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "1d": (nn.BatchNorm1d, {}),
    "2d": (nn.BatchNorm2d, {}),
    "3d": (nn.BatchNorm3d, {}),
    "not affine": (nn.BatchNorm2d, {"affine": False}),
    "cumulative": (nn.BatchNorm2d, {"momentum": None}),
    "no running statistics": (nn.BatchNorm1d, {"track_running_stats": False}),
    "large eps": (nn.BatchNorm2d, {"eps": 0.1, "momentum": 0.3}),
    "float64": (nn.BatchNorm2d, {"dtype": torch.float64}),
}
SIZES = (5, 2, 7, 1)
"""Samples of each rank."""


def net(kind: type[nn.Module], options: dict[str, Any]) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(kind(3, **options), nn.Tanh(), kind(3, **options))
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1, 0.3)
    return model


def batches(kind: type[nn.Module], dtype: torch.dtype, step: int, sizes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    shape = SHAPES[kind][1:]
    # A mean far from 0: sums of squares would lose it.
    return [torch.randn(size, *shape, generator=generator, dtype=torch.float64).to(dtype) * 2 + 50 for size in sizes]


def one_step(model: nn.Module, batch: Tensor, divisor: int) -> dict[str, Tensor]:
    batch = batch.clone().requires_grad_()
    output = model(batch)
    (output.sin().sum() / divisor).backward()
    assert batch.grad is not None
    return {"output": output.detach(), "input gradient": batch.grad}


def synced_steps(name: str, sizes: tuple[int, ...]) -> list[dict[str, Tensor]]:
    kind, options = CASES[name]
    model = net(kind, options)
    names = list(model.state_dict())
    assert sync_batch_stats(model, TorchGroup(dist.group.WORLD)) is model
    assert list(model.state_dict()) == names and isinstance(model[0], kind)
    found = []
    for step in range(3):
        model.zero_grad()
        batch = batches(kind, options.get("dtype", torch.float32), step, sizes)[dist.get_rank()]
        result = one_step(model, batch, sum(sizes))
        for parameter_name, parameter in model.named_parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)  # the reducer's part
            result[parameter_name] = parameter.grad.clone()
        found.append(result | {key: value.clone() for key, value in model.named_buffers()})
    model.eval()
    found.append({"output": model(batch).detach()})
    return found


@pytest.mark.parametrize("name", CASES)
def test_ranks_with_unequal_batches_equal_one_process(ranks: Any, name: str) -> None:
    kind, options = CASES[name]
    sizes = SIZES[:2]
    found = ranks(len(sizes), synced_steps, name, sizes)
    model = net(kind, options)
    tolerance = {"rtol": 1e-11, "atol": 1e-11} if "dtype" in options else {"rtol": 1e-5, "atol": 2e-5}
    for step in range(3):
        model.zero_grad()
        parts = batches(kind, options.get("dtype", torch.float32), step, sizes)
        whole = one_step(model, torch.cat(parts), sum(sizes))
        split = {key: value.split(sizes) for key, value in whole.items()}
        same = {key: p.grad for key, p in model.named_parameters()} | dict(model.named_buffers())
        for rank, results in enumerate(found):
            expected = {key: value[rank] for key, value in split.items()} | same
            assert results[step].keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(results[step][key], value, **tolerance, msg=lambda m, k=key: f"{k}: {m}")
    model.eval()
    if options.get("track_running_stats", True):
        for part, results in zip(parts, found):
            torch.testing.assert_close(results[3]["output"], model(part), **tolerance)


def test_four_ranks_one_of_them_with_a_single_sample(ranks: Any) -> None:
    found = ranks(4, synced_steps, "2d", SIZES)
    model = net(*CASES["2d"])
    for step in range(3):
        whole = one_step(model, torch.cat(batches(nn.BatchNorm2d, torch.float32, step, SIZES)), sum(SIZES))
    for key in ("output", "input gradient"):
        together = torch.cat([results[2][key] for results in found])
        torch.testing.assert_close(together, whole[key], rtol=1e-5, atol=2e-5)


def accumulated(micro_batches: int) -> dict[str, Tensor]:
    model = sync_batch_stats(net(nn.BatchNorm2d, {}), TorchGroup(dist.group.WORLD))
    for index in range(micro_batches):
        one_step(model, batches(nn.BatchNorm2d, torch.float32, index, SIZES[:2])[dist.get_rank()], sum(SIZES[:2]))
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    return {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())


def test_accumulation_equals_one_process_on_the_micro_batches_of_all_ranks(ranks: Any) -> None:
    found = ranks(2, accumulated, 4)
    model = net(nn.BatchNorm2d, {})
    for index in range(4):
        one_step(model, torch.cat(batches(nn.BatchNorm2d, torch.float32, index, SIZES[:2])), sum(SIZES[:2]))
    expected = {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())
    for results in found:
        for name, value in expected.items():
            torch.testing.assert_close(results[name], value, rtol=1e-5, atol=2e-5)


def an_empty_batch() -> dict[str, Tensor]:
    model = sync_batch_stats(net(nn.BatchNorm2d, {}), TorchGroup(dist.group.WORLD))
    batch = batches(nn.BatchNorm2d, torch.float32, 0, (4, 0))[dist.get_rank()]
    one_step(model, batch, 4)
    return dict(model.named_buffers())


def test_a_rank_without_samples_takes_part_and_changes_nothing(ranks: Any) -> None:
    found = ranks(2, an_empty_batch)
    model = net(nn.BatchNorm2d, {})
    one_step(model, batches(nn.BatchNorm2d, torch.float32, 0, (4,))[0], 4)
    for results in found:
        for name, value in model.named_buffers():
            torch.testing.assert_close(results[name], value, rtol=1e-5, atol=1e-5)


def narrow_step(dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    sync_batch_stats(model, TorchGroup(dist.group.WORLD))
    batch = batches(nn.BatchNorm2d, torch.float32, 0, (4, 4))[dist.get_rank()]
    with torch.autocast("cpu", dtype=dtype):
        output = model(batch)
    output.float().square().sum().backward()
    return output.detach(), model[0].weight.grad, dict(model.named_buffers())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_statistics_are_float32(ranks: Any, dtype: torch.dtype) -> None:
    found = ranks(2, narrow_step, dtype)
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    batch = torch.cat(batches(nn.BatchNorm2d, torch.float32, 0, (4, 4)))
    with torch.autocast("cpu", dtype=dtype):
        narrow = conv(batch)
    assert narrow.dtype == dtype
    expected = norm(narrow.float())
    for results, part in zip(found, expected.split((4, 4))):
        assert results[0].dtype == dtype
        torch.testing.assert_close(results[0], part.to(dtype), rtol=1e-2, atol=1e-2)
        # Statistics of the narrow activations, taken in float32: far more exact than the dtype itself.
        torch.testing.assert_close(results[2]["1.running_mean"], norm.running_mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(results[2]["1.running_var"], norm.running_var, rtol=1e-5, atol=1e-5)


def channels_last_step() -> tuple[bool, Tensor]:
    model = sync_batch_stats(net(nn.BatchNorm2d, {}), TorchGroup(dist.group.WORLD))
    batch = batches(nn.BatchNorm2d, torch.float32, 0, (4, 4))[dist.get_rank()]
    output = model(batch.to(memory_format=torch.channels_last))
    return output.is_contiguous(memory_format=torch.channels_last), (output - model(batch)).detach().abs().max()


def test_the_memory_format_stays(ranks: Any) -> None:
    for stays, difference in ranks(2, channels_last_step):
        assert stays and difference < 1e-5


def compiled_step() -> float:
    model = sync_batch_stats(net(nn.BatchNorm2d, {}), TorchGroup(dist.group.WORLD))
    batch = batches(nn.BatchNorm2d, torch.float32, 0, (4, 4))[dist.get_rank()]
    expected = one_step(copy.deepcopy(model), batch, 8)
    result = one_step(torch.compile(model, backend="eager"), batch, 8)
    return max(float((result[key] - expected[key]).abs().max()) for key in result)


def test_a_copy_and_a_compiled_model_compute_the_same(ranks: Any) -> None:
    assert max(ranks(2, compiled_step)) < 1e-6


class Alone:
    """A group for what happens before anything is exchanged."""

    rank = 0

    def __init__(self, size: int) -> None:
        self.size = size


class OwnForward(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class OwnStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))


class FrozenBatchNorm2d(OwnStatistics):
    pass


REFUSED = {
    "keeps statistics": OwnStatistics,
    "its instances": lambda: nn.InstanceNorm2d(3, track_running_stats=True),
    "forward of its own": lambda: OwnForward(3),
    "does not know its channels": lambda: nn.LazyBatchNorm2d(),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_synchronised_is_refused_by_name(reason: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.ReLU(), REFUSED[reason]()))
    with pytest.raises(PlanError, match=reason) as refusal:
        sync_batch_stats(model, Alone(2))
    assert "1.1 (" in str(refusal.value) and "plan.sync_batch_stats=false" in str(refusal.value)
    assert type(model[0]) is nn.BatchNorm2d  # nothing was changed


def test_what_keeps_no_batch_statistics_is_left_alone() -> None:
    model = nn.Sequential(nn.InstanceNorm2d(3), nn.LayerNorm(3), nn.GroupNorm(3, 3), FrozenBatchNorm2d())
    kinds = [type(module) for module in model]
    assert [type(module) for module in sync_batch_stats(model, Alone(2))] == kinds


def test_torchs_own_synchronised_norm_becomes_ours() -> None:
    model = sync_batch_stats(nn.Sequential(nn.SyncBatchNorm(3)), Alone(2))
    assert isinstance(model[0], SyncedBatchNorm) and isinstance(model[0], nn.SyncBatchNorm)


def test_one_rank_alone_changes_nothing() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), OwnStatistics())
    assert type(sync_batch_stats(model, Alone(1))[0]) is nn.BatchNorm2d


def test_synchronising_twice_is_refused() -> None:
    model = sync_batch_stats(nn.Sequential(nn.BatchNorm2d(3)), Alone(2))
    with pytest.raises(PlanError, match="synchronised already"):
        sync_batch_stats(model, Alone(2))
